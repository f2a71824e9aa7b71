"""What Hydra and OmegaConf refuse, in the words of the rest: field, value, what is allowed, and what may be meant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from pipelines.grid import CONF
from pmpd.config.names import did_you_mean, holds_groups, is_open, near, nearest, takes


def explain(error: BaseException) -> str:
    """One line for an error of Hydra's, OmegaConf's or a YAML file's; any other's own words."""
    if isinstance(error, AssertionError) and (override := field_of_null(error)):
        holder = override.partition("=")[0].rpartition(".")[0]
        return f"{override} is not possible: {holder} is null here, so it has no fields"
    if isinstance(error, MissingConfigException):
        return _choice(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} is not possible: an override is NAME=VALUE, a list 'NAME=[A,B]', a text \"NAME='A, B'\""
        )
    if isinstance(error, YAMLError):
        return " ".join(str(error).split())
    cause = _refused(error) if isinstance(error, (HydraException, OmegaConfBaseException)) else None
    if cause is None:
        return _composition(error) if isinstance(error, ConfigCompositionException) else str(error)
    name, place = cause.full_key or "", _where(error)
    if isinstance(cause, MissingMandatoryValue):
        return f"{name} is missing{place}: give {name}=..."
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        held = cause.parent_node if isinstance(cause.parent_node, DictConfig) else {}
        return _field(name, _given(error), place, [str(key) for key in held])
    value = getattr(cause, "value", None)
    words = (takes(name, value) if isinstance(cause, ValidationError) else None) or str(cause).partition("\n")[0]
    shown = f"{name}={value}" if takes(name, value) and value is not None else _given(error) or name
    return f"{shown} is not possible{place}: {words}"


def field_of_null(error: AssertionError) -> str | None:
    """The override whose assertion this is: OmegaConf has no error of its own for a field of what is null."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code is not OmegaConf.update.__code__:
        return None
    return "{key}={value}".format(**trace.tb_frame.f_locals)


def _choice(error: MissingConfigException) -> str:
    """A group has no such file."""
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if error.options is None:
        return " ".join(str(error).partition("\n")[0].split())
    allowed = f"one of {', '.join(error.options)}{did_you_mean(nearest(choice, error.options))}"
    return f"{group}={choice} is not possible{_where(error)}: {allowed}"


def _field(name: str, given: str, place: str, held: Sequence[str]) -> str:
    """There is no such field beside those that are ``held``."""
    parent, _, leaf = name.rpartition(".")
    shown = given or name
    if is_open(parent):
        group = name.partition(".")[0]
        added = f"in a file of conf/{group}" if holds_groups(parent) else f"+{shown}"
        meant = did_you_mean(nearest(leaf, held))
        return f"{shown} is not possible{place}: {parent} has no {leaf}; to add it: {added}{meant}"
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    meant = did_you_mean(near(name, groups)) or "; --cfg job shows all"
    return f"{shown} is not possible{place}: there is no field {name}{meant}"


def _composition(error: ConfigCompositionException) -> str:
    """What names no field: Hydra's words, but where they are the user's riddle."""
    words = str(error)
    if found := re.match(r"Multiple values for (\S+)\..*: (\S+)'", words):
        return f"+{found[1]}={found[2]} is not possible: {found[1]} has a value; to change it: {found[1]}={found[2]}"
    if found := re.match(r"Ambiguous value for argument '(.*)'", words):
        return f"{found[1]} is not possible: to run one after another add -m; a list is 'NAME=[A,B]'"
    return " ".join(words.split())


def _refused(error: BaseException) -> OmegaConfBaseException | None:
    """What OmegaConf said below what Hydra made of it."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OmegaConfBaseException):
        below = below.__cause__ or below.__context__
    return below


def _given(error: BaseException) -> str:
    """The override that was refused, as far as Hydra repeats it."""
    found = re.search(r"(?:use \+|merging override )(\S+=.*)$", str(error))
    return found[1] if found else ""


def _where(error: BaseException) -> str:
    """The file that is wrong, if it is not the command line."""
    found = re.match(r"In '(.+?)': ", str(error))
    return "" if found is None or found[1] in ("config", "tune", "hydra/config") else f" in {found[1]}.yaml"


__all__ = ["explain", "field_of_null"]
