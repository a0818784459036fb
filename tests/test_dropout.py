"""Dropout by sequence: its masks are random enough, and depend on the sequence alone."""
import math

import pytest
import torch
from conftest import toy_config, toy_ids
from test_train import out, rows

import train
from nanogqa import dropout
from nanogqa.batches import Batches, dropout_seeds
from nanogqa.dataloader import Dataset
from nanogqa.dropout import SequenceDropout, mask
from nanogqa.runtime import pick_runtime
from model import GPT
from train import TrainConfig

B, T, C = 16, 64, 96


def standard(p, layer=0, first=0):
    """(B, T, C): the mask of sequences first on, scaled to mean 0 and variance 1."""
    seeds = torch.tensor(dropout_seeds(TrainConfig(dropout=p), first, B))
    return (mask(seeds, layer, T, C, p).double() - p) / math.sqrt(p * (1 - p))


def deviation(product):
    """How far the mean of independent numbers with mean 0 is from 0, in standard deviations."""
    return abs(product.mean().item()) * math.sqrt(product.numel()) / product.std().item()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_masks_have_the_right_share_and_no_pattern(p):
    """Every limit below is 4.5 standard deviations: the masks are the same each time."""
    x = standard(p)
    assert deviation(x) < 4.5 and x.var().item() == pytest.approx(1, abs=0.15)
    for axes in ((0, 1), (0, 2), (1, 2)):  # of each column, row and sequence: sums of squares
        means = x.mean(axes)
        n = means.numel()
        total = means.square().sum().item() * x.numel() / n
        assert abs(total - n) / math.sqrt(2 * n) < 4.5, axes
    for lag in (1, 2, 4, 8, 32):
        assert deviation(x[:, :, lag:] * x[:, :, :-lag]) < 4.5, ("columns", lag)
        assert deviation(x[:, lag:] * x[:, :-lag]) < 4.5, ("rows", lag)
    assert deviation(x[1:] * x[:-1]) < 4.5, "sequences"
    assert deviation(x * standard(p, layer=1)) < 4.5, "layers"
    assert deviation(x * standard(p, first=B)) < 4.5, "steps"
    square = x[:, 1:, 1:] * x[:, 1:, :-1] * x[:, :-1, 1:] * x[:, :-1, :-1]
    assert deviation(square) < 4.5, "the corners of squares, which a linear hash would tie"
    power = torch.fft.fft2(x).abs().square() / (T * C)
    assert power.mean(0).max().item() < 6, "no wave stands out"


def test_every_sequence_of_every_run_has_its_own_mask(toy_data):
    """In all micro-steps of the first steps of two seeds."""
    runtime, seeds = pick_runtime("cpu", "float32", False), []
    for seed in (1, 2):
        config = TrainConfig(dropout=0.1, seed=seed, block_size=32, tokens_per_step=256, batch_size=2)
        batches = Batches(Dataset(toy_data), config, runtime)
        for step in range(3):
            for batch in batches.training(step):
                seeds += batch.seeds.tolist()
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 8


def test_what_is_kept_is_scaled_and_the_rest_is_as_in_plain_dropout():
    x = torch.ones(B, T, C, requires_grad=True)
    module = SequenceDropout(0.2, 3)
    dropout.set_seeds(torch.arange(B))
    y = module(x)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    y.sum().backward()
    assert torch.equal(x.grad, y), "the gradient has the same mask"
    assert module.eval()(x) is x and SequenceDropout(0.0, 3)(x) is x
    assert y.to(torch.bfloat16).dtype == module.train()(x.to(torch.bfloat16)).dtype


def test_a_sequence_has_its_mask_wherever_it_is_and_no_random_state_is_used():
    seeds = torch.tensor(dropout_seeds(TrainConfig(dropout=0.1), 7, 4))
    whole = mask(seeds, 2, T, C, 0.1)
    assert torch.equal(whole[2:3], mask(seeds[2:3], 2, T, C, 0.1))
    assert torch.equal(whole[:, :10], mask(seeds, 2, 10, C, 0.1)), "shorter sequences, same rows"
    model = dropout.by_sequence(GPT(toy_config(dropout=0.5))).train()
    before = torch.get_rng_state()
    dropout.set_seeds(seeds[:2])
    logits = model(toy_ids())[0]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits, model(toy_ids())[0])
    dropout.set_seeds(seeds[2:])
    assert not torch.allclose(logits, model(toy_ids())[0])


def test_each_place_of_a_model_has_its_own_layer():
    model = dropout.by_sequence(GPT(toy_config(dropout=0.5)))
    layers = [m.number for m in model.modules() if isinstance(m, SequenceDropout)]
    assert sorted(layers) == list(range(5)), "the embedding, and two in each of two blocks"
    assert not any(type(m) is torch.nn.Dropout for m in model.modules())


def test_one_graph_serves_all_seeds():
    model = dropout.by_sequence(GPT(toy_config(dropout=0.5))).train()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for first in range(3):
        dropout.set_seeds(torch.arange(first, first + 2))
        torch.testing.assert_close(compiled(toy_ids())[0], model(toy_ids())[0])
    assert len(graphs) == 1


def test_micro_batches_of_any_size_have_the_same_losses(toy_run, tmp_path):
    """The step's 8 sequences one by one, in pairs, and at once, which is the default."""
    args = [*toy_run, "--dropout=0.2", "--max_steps=8", "--log_interval=1", "--learning_rate=1e-3"]
    for size in ("None", "1", "2"):
        train.main(out([*args, f"--batch_size={size}"], tmp_path / size))
    for size in ("1", "2"):
        for a, b in zip(rows(tmp_path / "None"), rows(tmp_path / size), strict=True):
            for key in ("train_loss", "val_loss", "grad_norm"):
                same = a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5)
                assert same, (size, a["step"], key)
    train.main(out([*args, "--dropout=0"], tmp_path / "without"))
    first, without = rows(tmp_path / "None")[1], rows(tmp_path / "without")[1]
    assert abs(first["train_loss"] - without["train_loss"]) > 1e-4, "there is dropout"
