"""Every scheduler through the pipeline on a tiny random model, against its definition worked out from the rollouts."""

from __future__ import annotations

import json
import shutil
import statistics

import pandas as pd
import pytest
import torch

from pipelines.plan import Planner
from pipelines.run import run_cell
from pmpd.artifacts import Node, Store
from pmpd.metrics import rouge_l
from pmpd.records import Schedule
from pmpd.schedulers import policies
from pmpd.stages import RuntimeConfig, execute
from pmpd.stages.inputs import read_samples
from pmpd.stages.rollouts import read_rollouts
from pmpd.stages.runtime import load, load_prompter
from tests.pipelines.cells import cell, overrides, run


@pytest.mark.parametrize("hindsight", ["oracle", "oracle_lossless"])
def test_the_oracle_is_the_best_class_of_every_sample(store, tiny_llama, tmp_path, hindsight):
    own = run(tiny_llama, store, tmp_path, f"scheduler={hindsight}")
    cell_ = Planner(cell(*overrides(tiny_llama, store, f"scheduler={hindsight}")), Store(store)).cell()
    samples, _ = read_samples(Store(store).verify(cell_.evaluation.inputs["prompts"]))
    inputs = cell_.evaluation.inputs
    table = read_rollouts(*(Store(store).verify(inputs[name]) for name in ("rollouts", "rollouts_fp16")))
    classes = [Schedule(4, (2,)), Schedule(4, (4, 2), (3,)), Schedule(4, (4, 2), (6,)), Schedule.uniform(4)]

    def quality(schedule, sample):
        return rouge_l(table[schedule][sample.id].generations[0].text, sample.references)

    expected = []
    for sample in samples:
        of_class = [quality(c, sample) for c in classes]
        passing = [q for q in of_class if q >= of_class[-1]]
        expected.append(max(of_class) if hindsight == "oracle" else passing[0])
    found = own[(own.scheduler == hindsight) & (own.metric == "rouge_l")].value.item()
    assert found == pytest.approx(100 * sum(expected) / len(expected))


def test_the_confidence_scheduler_decodes_what_its_rule_says(store, tiny_llama, tmp_path):
    more = ["scheduler=confidence", "scheduler.options.first_tokens=2", "scheduler.options.sigmas=0.1"]
    run(tiny_llama, store, tmp_path, *more)
    planned = Planner(cell(*overrides(tiny_llama, store, *more)), Store(store)).cell().evaluation
    samples, prompts = read_samples(Store(store).verify(planned.inputs["prompts"]))
    nested = Store(store).verify(planned.inputs["decisions"].inputs["nested"])
    model, precision = load(tiny_llama, nested, RuntimeConfig("float32", "cpu"))
    rows = [json.loads(line) for line in (Store(store).verify(planned) / "completions.jsonl").read_text().splitlines()]
    switched = 0
    for sample, prompt, row in zip(samples, prompts, rows, strict=True):
        assert row["id"] == sample.id
        precision.bits = 4
        ids, bits, sure = list(prompt), 4, []
        for token in row["generations"][0]["token_ids"]:
            with torch.no_grad():
                # Until the switch all of the cache is of 4 bits, so computing it again is the definition.
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token
            sure.append(float(logits.double().softmax(-1).max()))
            if len(sure) > 2 and sure[-1] > statistics.fmean(sure[:2]) + 0.1 * statistics.stdev(sure[:2]):
                bits = 2
                break
            ids.append(token)
        expected = "4:2" if bits == 2 and len(sure) == 1 else f"4:4@{len(sure) - 1},2" if bits == 2 else "4:4"
        found = Schedule.parse(row["generations"][0]["schedule"])
        tokens = len(row["generations"][0]["token_ids"])
        assert found.bits_of(tokens) == Schedule.parse(expected).bits_of(tokens)
        switched += bits == 2
    assert switched, "no sample switched: this test shows nothing"


def test_a_policy_that_was_edited_decides_again(store, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    file = tmp_path / "edited.py"
    text = (
        "from pmpd.schedulers import Fixed\nTRAINED = ()\n\ndef build(setting):\n    return Fixed(setting.classes[0])\n"
    )
    lines = overrides(tiny_llama, store, "scheduler=learned", "scheduler.policy=edited")

    def key():
        return Planner(cell(*lines), Store(store)).cell().evaluation.inputs["decisions"].key

    file.write_text(text)
    first = key()
    assert key() == first
    file.write_text(text.replace("[0]", "[-1]"))
    assert key() != first


def test_a_killed_decision_goes_on_and_draws_alike(store, tiny_llama, tmp_path, two_turns):
    lines = overrides(
        tiny_llama, store, "task=mtbench", f"data.root={two_turns}", "data.text_root=samples", "scheduler=random"
    )
    config = cell(*lines, "budget.batch_size=2")
    run_cell(config, tmp_path / "out")
    node = Planner(config, Store(store)).cell().evaluation.inputs["decisions"]
    inputs = {n: Store(store).verify(i) if isinstance(i, Node) else i.locate() for n, i in node.inputs.items()}
    whole = (Store(store).verify(node) / "completions.jsonl").read_text()
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(Store(store).verify(node) / "batch_00000.jsonl", again)
    execute(node, inputs, again)
    assert (again / "completions.jsonl").read_text() == whole


def test_static_and_learned_decode_at_the_bits_of_their_schedules(store):
    for path in store.glob("evaluate/*/artifact.json"):
        config = json.loads(path.read_text())["config"]
        fitted = config["schedule"] is None and config["curve"][0] == "4:4@0,2"  # not given, and of two precisions
        if config["scheduler"] not in ("static", "learned") or not fitted:
            continue
        for line in (path.parent / "completions.jsonl").read_text().splitlines():
            for generation in json.loads(line)["generations"]:
                prefill, _, levels = generation["schedule"].partition(":")
                assert prefill == "4"
                assert levels in ("4", "2", "4@3,2", "4@6,2", "4@0,2", "4@9,2")


@pytest.mark.parametrize("more", [["scheduler=learned"], ["scheduler=static", "scheduler.switch_step=3"]], ids=" ".join)
def test_each_policy_keeps_its_own_first_answer(store, tiny_llama, tmp_path, two_turns, more):
    lines = overrides(tiny_llama, store, "task=mtbench", f"data.root={two_turns}", "data.text_root=samples", *more)
    config = cell(*lines)
    run_cell(config, tmp_path / "out")
    planned = Planner(config, Store(store)).cell().evaluation
    prompter = load_prompter(tiny_llama, config.model.prompt, False)
    samples, _ = read_samples(Store(store).verify(planned.inputs["prompts"]))
    turns = {s.id: s.turns for s in samples}
    fp16 = read_rollouts(Store(store).verify(planned.inputs["rollouts_fp16"]))[Schedule.uniform(16)]
    differs = 0
    for line in (Store(store).verify(planned) / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        first, second = row["generations"]
        asked = prompter.ids(turns[row["id"]], [first["text"]])
        assert second["prompt_tokens"] == len(asked)
        differs += len(asked) != len(prompter.ids(turns[row["id"]], [fp16[row["id"]].generations[0].text]))
    assert differs, "every first answer is as long as fp16's: this test shows nothing"
    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    assert frame[(frame.scheduler == "fp16") & (frame.metric == "rouge_l")].value.item() == pytest.approx(100)
    own = frame[frame.scheduler == config.scheduler.name].set_index("metric")
    for quantity in ("rouge_l", "rouge_l minus high", "agreement"):
        first, _, minus = quantity.partition(" minus")
        category = f"{first} of writing" + (" minus high" if minus else "")
        assert own.loc[category, "value"] == pytest.approx(own.loc[quantity, "value"])  # it is every sample's
        assert own.loc[category, "n"] == 4
    assert own.loc["unended_answers", "n"] == 8  # two answers a sample
    assert "| writing" in (tmp_path / "out" / "table.md").read_text()
