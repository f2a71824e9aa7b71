from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from pmpd.records import Prefill, class_schedules
from pmpd.schedulers import Features, Learned, train
from pmpd.schedulers.train import balanced_order, pad

SETTINGS: dict[str, Any] = {
    "epochs": 15,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "dropout": 0.1,
    "batch": 16,
    "holdout": 0.2,
    "seed": 0,
}


def make_data(n: int = 150, num_classes: int = 3, seed: int = 0) -> tuple[list[Features], list[int]]:
    """One position of each sequence is marked in its keys; its values say the class. Lengths and classes differ."""
    generator = torch.Generator().manual_seed(seed)
    features, labels = [], []
    for i in range(n):
        length = int(torch.randint(3, 20, (), generator=generator))
        label = 0 if i % 2 else int(torch.randint(num_classes, (), generator=generator))
        keys, values = (20 * torch.randn(2, length, 8, generator=generator) for _ in range(2))
        where = int(torch.randint(length, (), generator=generator))
        keys[:, where] = 30.0 * torch.tensor([1, -1, 1, -1, 1, -1, 1, -1])
        values[:, where] = 0
        values[:, where, label] = 60
        features.append(Features(keys.half(), values.half()))
        labels.append(label)
    return features, labels


def test_what_can_be_learned_is_learned() -> None:
    features, labels = make_data(300)
    network, report = train(features, labels, 3, **SETTINGS)
    assert report.holdout_accuracy >= 0.9
    assert report.majority_accuracy < 0.8
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert len(report.losses) == SETTINGS["epochs"]
    assert report.num_parameters == sum(p.numel() for p in network.parameters())
    fresh, truth = make_data(100, seed=1)
    scheduler = Learned(network, 4, class_schedules(4, (4, 3), 9, parts=2))
    said = [scheduler.begin(Prefill(f.keys, f.values, torch.zeros(1), 9)).schedule for f in fresh]
    right = sum(scheduler.classes[t] == s for t, s in zip(truth, said, strict=True))
    assert right >= 85


@pytest.mark.parametrize("feature", ["last_mean", "all_statistics"])
def test_what_only_activations_say_is_learned_from_them(feature: str) -> None:
    generator = torch.Generator().manual_seed(3)
    features, labels = [], []
    for _ in range(200):
        label = int(torch.randint(2, (), generator=generator))
        activations = torch.rand(3, 2, 16, generator=generator)
        if feature == "last_mean":
            activations[-1, 0, label] += 3
        else:
            activations[label, 1] += 3  # the variance of one block or another
        features.append(Features(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), activations))
        labels.append(label)
    network, report = train(features, labels, 2, inputs=[feature], **SETTINGS)
    assert network.reads_activations
    assert report.holdout_accuracy >= 0.9
    assert report.holdout_loss < 0.5
    assert train(features, labels, 2, inputs=["kv"], **SETTINGS)[1].holdout_accuracy < 0.8


def test_noise_is_not_reported_as_learned() -> None:
    features, _ = make_data()
    labels = torch.randint(3, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    assert train(features, labels, 3, **SETTINGS)[1].holdout_accuracy < 0.65


def test_the_report_counts_the_held_out_samples_as_they_fall() -> None:
    features, labels = make_data()
    network, report = train(features, labels, 3, **SETTINGS)
    assert (report.num_train, report.num_holdout) == (120, 30)
    assert report.label_counts == tuple(labels.count(k) for k in range(3))
    truth = Counter(labels[i] for i in report.holdout)
    assert [sum(row) for row in report.confusion] == [truth[k] for k in range(3)]
    assert report.holdout_accuracy == pytest.approx(sum(report.confusion[k][k] for k in range(3)) / 30)
    assert report.majority_accuracy == pytest.approx(truth[0] / 30)
    said = [int(network(features[i].keys[None], features[i].values[None]).argmax()) for i in report.holdout]
    assert report.holdout_accuracy == pytest.approx(
        sum(labels[i] == k for i, k in zip(report.holdout, said, strict=True)) / 30
    )


def test_held_out_samples_do_not_reach_training() -> None:
    features, labels = make_data(60)
    first, report = train(features, labels, 3, **SETTINGS)
    for i in report.holdout:
        features[i] = Features(torch.full_like(features[i].keys, 7), torch.full_like(features[i].values, -7))
    second, _ = train(features, labels, 3, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_same_arguments_give_the_same_network() -> None:
    features, labels = make_data(60)
    torch.manual_seed(1)
    first, one = train(features, labels, 3, **SETTINGS)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second, two = train(features, labels, 3, **SETTINGS)
    assert torch.equal(torch.random.get_rng_state(), before), "training draws from the caller's random numbers"
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    third, three = train(features, labels, 3, **SETTINGS | {"seed": 1})
    assert three.holdout != one.holdout
    assert not torch.equal(third.hidden.weight, first.hidden.weight)


def test_one_sample_is_held_out_at_least() -> None:
    features, labels = make_data(4)
    report = train(features, labels, 3, **SETTINGS | {"holdout": 0.1, "epochs": 1})[1]
    assert (report.num_train, report.num_holdout) == (3, 1)


def test_balancing_shows_every_class_as_often() -> None:
    labels = [0] * 10 + [2] * 4 + [3]
    rows = balanced_order(labels, torch.Generator().manual_seed(0))
    assert Counter(labels[r] for r in rows) == {0: 10, 2: 10, 3: 10}
    times = Counter(rows)
    assert {times[r] for r in range(10)} == {1}
    assert {times[r] for r in range(10, 14)} == {2, 3}


def test_padding_puts_zeros_at_the_end() -> None:
    features = [Features(torch.full((2, n, 8), 1.0 + n), torch.full((2, n, 8), -1.0)) for n in (3, 5)]
    keys, values, mask, activations = pad(features)
    assert activations is None
    assert keys.shape == values.shape == (2, 2, 5, 8)
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(keys[0, :, :3], features[0].keys)
    assert keys[0, :, 3:].abs().sum() == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1, 4], r"labels \[4\] are not among the 3 classes"), ([0, 1], "3 features, 2 labels")],
)
def test_bad_labels_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_data(3)[0], labels, 3, **SETTINGS)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="1 samples: at least 2"):
        train(make_data(1)[0], [0], 3, **SETTINGS)


def test_epochs_are_a_bar_on_a_terminal_and_nothing_in_a_log(stderr: Any) -> None:
    features, labels = make_data(20)
    log = stderr("log")
    train(features, labels, 3, **SETTINGS, progress=True)
    assert log.getvalue() == ""
    screen = stderr("terminal")
    train(features, labels, 3, **SETTINGS)
    assert screen.getvalue() == ""
    train(features, labels, 3, **SETTINGS, progress=True)
    assert f"/{SETTINGS['epochs']} " in screen.getvalue()
