"""What a plan starts from, keyed by content: data, BERTScore's encoder, modules of policies and tasks, the device.

Finds and keys them; reads no text and loads no weight.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from pmpd.artifacts import Input, Root, digest_files
from pmpd.config import Config, ConfigError, Device
from pmpd.metrics import encoder_folder
from pmpd.models import ModelError, digest, resolve
from pmpd.schedulers import policy_file
from pmpd.stages.inputs import DATA, DataConfig
from pmpd.tasks import DataError, hub_commit, locate, rules_file


def text_input(config: Config, digests: Path) -> Input:
    """The plain text of calibration, perplexity and seed prompts.

    Raises:
        DataError: as for every data set, no such file, or a hub that does not answer.
    """
    budget, data = config.budget, config.data
    try:
        return _data_input(
            data.text_root or data.root,
            budget.text_dataset,
            budget.text_split,
            budget.text_hub_path,
            budget.text_hub_config,
            budget.text_hub_revision,
            budget.text_rows,
            digests,
        )
    except DataError as error:
        if data.root is None or data.text_root is not None or not Path(data.root).is_dir():
            raise
        elsewhere = "plain text may lie elsewhere: data.text_root=DIR, or data.text_root=samples for what is shipped"
        raise DataError(f"{error}; {elsewhere}") from error


def task_input(config: Config, split: str, digests: Path) -> Input:
    """A split of the cell's task.

    Raises:
        DataError: as :func:`text_input`.
    """
    task = config.task
    return _data_input(
        config.data.root,
        task.dataset,
        split,
        task.hub_path,
        task.hub_config,
        task.hub_revision,
        None,
        digests,
    )


def _data_input(
    root: str | None,
    dataset: str,
    split: str,
    hub_path: str | None,
    hub_config: str | None,
    revision: str,
    max_rows: int | None,
    digests: Path,
) -> Input:
    """A local file below ``root``, or the stage that downloads the split."""
    file = locate(dataset, split, root)
    if file is None:
        assert hub_path is not None  # refused with the configuration
        return DATA.node(DataConfig(hub_path, hub_config, hub_commit(hub_path, revision), split, max_rows))
    found: Path = file
    return Root(str(found), digest_files([found], digests), partial(Path, found))


def policy_input(policy: str, digests: Path) -> dict[str, Input]:
    """A policy's module by its text, so that one being written is never answered by what it said before; nothing of a
    shipped one.

    Raises:
        ValueError: no such policy.
    """
    return _module_input("policy", policy_file(policy), digests)


def rules_input(dataset: str, digests: Path) -> dict[str, Input]:
    """The module of a data set's rules, likewise; nothing of a shipped one.

    Raises:
        DataError: no such data set.
    """
    return _module_input("rules", rules_file(dataset), digests)


def _module_input(name: str, file: Path | None, digests: Path) -> dict[str, Input]:
    return {} if file is None else {name: Root(file.name, digest_files([file], digests), partial(Path, file))}


def encoder_input(encoder: str, digests: Path) -> Root:
    """BERTScore's encoder: a local folder by content, a hub model by commit.

    Raises:
        EncoderError, ConfigError: it is not there, and the hub does not answer.
    """
    local = encoder_folder(encoder)
    if local is not None:
        files = [p for p in local.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".txt", ".model")]
        return Root(encoder, digest_files(files, digests), partial(Path, local))
    try:
        source = resolve(encoder)
    except ModelError as error:
        raise ConfigError(
            f"budget.bertscore_encoder={encoder} is not here: {error}. Without it: task.metrics=[rouge_l]"
        ) from error
    return Root(encoder, digest(source), Path)


def device_type(config: Config) -> str:
    """``cuda`` or ``cpu``: the device asked for, or the one that is there."""
    if config.device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device.value
