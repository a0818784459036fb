"""Files that are replaced as a whole or not at all."""
import json
import os


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def write_json(path, content):
    """Replaces path as a whole, and on the disk."""
    with open(f"{path}.part", "w") as file:
        json.dump(content, file, indent=1)
        sync(file)
    os.replace(f"{path}.part", path)
