"""`reshard.doctor`: examine a model folder, name what is wrong with it, and write a repaired one.

read -> every check of the table -> (with `repair`) repair -> check again -> commit

A training checkpoint is examined by itself (`training.py`), and is not repaired.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.conversion.base_model import read_base
from reshard.conversion.declared import workers
from reshard.conversion.destination import check_destination
from reshard.core.collecting import paused_gc
from reshard.core.findings import Finding
from reshard.core.options import PathLike, documented, parse
from reshard.diagnosis import adapters, training
from reshard.diagnosis import case as cases
from reshard.diagnosis import folder as folders
from reshard.diagnosis.adapters import Adapter
from reshard.diagnosis.case import Case
from reshard.diagnosis.checks.engines import CHECKS as ENGINE_CHECKS
from reshard.diagnosis.declared import DOCTOR
from reshard.diagnosis.engines import EngineName
from reshard.diagnosis.repair import write_repaired
from reshard.diagnosis.signs import CheckResult, result_of
from reshard.diagnosis.table import CHECKS
from reshard.diagnosis.training import Examined
from reshard.errors import OptionError, PlanError, VerificationError
from reshard.formats import Selection
from reshard.naming.rewards import REWARD_HEAD
from reshard.naming.value_heads import VALUE_HEAD
from reshard.progress import StagedProgress
from reshard.storage.local import Sources, snapshot
from reshard.storage.paths import exists, is_file, real

# No save, part or role was named.
_ANY = Selection(None, None, True, None)


class Diagnosis(Struct, frozen=True):
    """What is wrong with a folder.

    `repairable` are the codes of the findings that `repair` fixes. `repaired` is the repaired
    folder, None where none was written. `remaining` are the findings that it still has, or that
    `folder` has where there is no repaired one. `strict` makes errors of warnings: of all, or of
    those with the codes that it lists. Sizes are bytes.
    """

    folder: str
    base: str | None
    num_tensors: int
    total_bytes: int
    findings: tuple[Finding, ...]
    repairable: tuple[str, ...]
    repaired: str | None
    remaining: tuple[Finding, ...]
    strict: bool | tuple[str, ...] = False

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The errors that remain, and the warnings that `strict` makes errors."""
        return tuple(
            finding
            for finding in self.remaining
            if finding.severity == "error" or finding.refused_by(self.strict)
        )

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as JSON values, as `doctor --json` prints it."""
        return {
            "folder": self.folder,
            "base": self.base,
            "num_tensors": self.num_tensors,
            "total_bytes": self.total_bytes,
            "findings": [finding.to_json() for finding in self.findings],
            "repairable": list(self.repairable),
            "repaired": self.repaired,
            "remaining": [finding.code for finding in self.remaining],
        }


@documented(DOCTOR)
def doctor(
    folder: PathLike,
    *,
    base: PathLike | None = None,
    tag: str | None = None,
    prefix: str | None = None,
    role: str | None = None,
    repair: PathLike | None = None,
    engine: EngineName | None = None,
    strict: bool | Sequence[str] = False,
    threads: int | None = None,
    progress: StagedProgress | None = None,
) -> Diagnosis:
    """Find what is wrong with the model folder `folder`, from any tool, or with the training
    checkpoint there.

    `folder` itself is never touched. The weights are streamed, in blocks.

    Raises `OptionError` for a wrong value, and another `ReshardError` where there is no model to
    look at or no base, and where the output cannot be written; what is wrong with `folder` is never
    an exception. A checkpoint is not repaired.

    >>> diagnosis = doctor("export", base="Qwen2.5-7B", repair="repaired")     # doctest: +SKIP
    >>> [finding.code for finding in diagnosis.findings]                     # doctest: +SKIP
    ['wrapper-prefix', 'tokenizer-missing']
    """
    values = parse(DOCTOR, dict(locals()))
    path, base_path, output = snapshot(values["folder"]), values["base"], values["repair"]
    if base_path is not None and exists(base_path) and real(path) == real(base_path):
        raise PlanError("the folder is the base itself.", path=path)
    if output is not None:
        check_destination(output, path, base_path, overwrite=False, replaces=False)
    threads = workers(values["threads"])
    with Sources() as sources:
        if engine is not None and adapters.is_adapter(path):
            held = adapters.read(path, sources)
            sources.check_unchanged()
            noted = adapters.examine(held, engine)
            return _as_it_is(folder, base, _of_adapter(held, noted), values["strict"])
        with paused_gc():
            known = None if base_path is None else read_base(base_path, sources)
        selection = Selection(values["tag"], values["prefix"], True, values["role"])
        if selection != _ANY or not folders.is_model(path):
            _check_examined_alone(path, output, engine)
            seen = training.examine(
                path, known, selection, sources, threads=threads, progress=progress
            )
            sources.check_unchanged()
            return _as_it_is(folder, base, seen, values["strict"])
        case = cases.read(path, known, sources, threads=threads, progress=progress)
        results = examine(case, engine)
        findings = tuple(each.finding for each in results)
        remaining, repaired = findings, None
        if output is not None and _repairable(results):
            _check_alone(case)
            _check_numbers(case)
            remaining = _repair(case, results, output, sources, threads, engine, progress)
            repaired = os.fspath(output)
        sources.check_unchanged()
    return Diagnosis(
        folder=os.fspath(folder),
        base=None if base is None else os.fspath(base),
        num_tensors=len(case.folder.entries),
        total_bytes=sum(entry.spec.nbytes for entry in case.folder.entries.values()),
        findings=findings,
        repairable=tuple(each.finding.code for each in results if each.repair is not None),
        repaired=repaired,
        remaining=remaining,
        strict=values["strict"],
    )


def _check_examined_alone(path: Path, output: Path | None, engine: EngineName | None) -> None:
    """Refuse the options that need a model, not a training checkpoint."""
    option = "repair" if output is not None else "engine" if engine is not None else None
    if option is not None and exists(path):
        raise OptionError(
            f"{path} is not a folder with a model, and doctor does not repair training "
            "checkpoints or check them for an engine.",
            hint="Convert it, and name the output: reshard convert SRC OUT --base HF_DIR.",
            option=option,
        )


def _of_adapter(adapter: Adapter, findings: tuple[Finding, ...]) -> Examined:
    """What an engine makes of an adapter folder, which holds no model."""
    nbytes = sum(spec.nbytes for spec in adapter.tensors.values())
    return Examined(len(adapter.tensors), nbytes, findings)


def _as_it_is(
    folder: PathLike, base: PathLike | None, seen: Examined, strict: bool | tuple[str, ...]
) -> Diagnosis:
    """The diagnosis of what is not repaired."""
    named = None if base is None else os.fspath(base)
    return Diagnosis(
        folder=os.fspath(folder),
        base=named,
        num_tensors=seen.num_tensors,
        total_bytes=seen.total_bytes,
        findings=seen.findings,
        repairable=(),
        repaired=None,
        remaining=seen.findings,
        strict=strict,
    )


def examine(case: Case, engine: EngineName | None = None) -> tuple[CheckResult, ...]:
    """What every check of the table finds in the folder, and those of an engine."""
    seen = [(code, check(case)) for code, check in CHECKS.items()]
    if engine is not None:
        seen += [(code, check(case, engine)) for code, check in ENGINE_CHECKS.items()]
    return tuple(result_of(code, signs) for code, signs in seen if signs is not None)


def _repairable(results: Sequence[CheckResult]) -> bool:
    """Whether there is something to repair, and no error that a copy would keep."""
    hopeless = any(f.finding.severity == "error" and f.repair is None for f in results)
    return not hopeless and any(each.repair is not None for each in results)


def _check_alone(case: Case) -> None:
    """Refuse to repair a model whose other half, its head, would be left out."""
    heads = [name for name in (REWARD_HEAD, VALUE_HEAD) if is_file(case.folder.path / name)]
    if heads:
        raise PlanError(
            f"{heads[0]} lies beside the model, and a repaired copy would lack it.",
            path=case.folder.path,
            hint="Convert the run's checkpoint again: reshard convert RUN OUT --base HF_DIR.",
        )


def _check_numbers(case: Case) -> None:
    """Refuse to repair an intact quantised model: the copy would have 16-bit weights."""
    found = case.quantisation
    if found.unread is not None or (found.kinds and found.stated is not None):
        raise PlanError(
            "its weights are quantised, but a repaired copy would be dequantised.",
            path=case.folder.path,
            hint="Make the 16-bit model first, and repair that: reshard convert DIR OUT."
            if found.unread is None
            else "Repair the unquantised model that it was made from.",
        )


def _repair(
    case: Case,
    results: Sequence[CheckResult],
    output: Path,
    sources: Sources,
    threads: int,
    engine: EngineName | None,
    progress: StagedProgress | None,
) -> tuple[Finding, ...]:
    """Write the repaired folder, and return the warnings that it keeps."""
    kept: list[Finding] = []

    def check(partial: Path) -> None:
        # By themselves: these files get another place, and are then no longer what was opened.
        with Sources() as written:
            again = cases.read(partial, case.base, written, threads=threads, weights=False)
        kept.extend(each.finding for each in examine(again, engine))
        for finding in kept:
            if finding.severity == "error":
                raise VerificationError(
                    f"the repaired folder still has {finding.code}: {finding.message}. Nothing "
                    "was written.",
                    path=case.folder.path,
                    hint="Convert the run's checkpoint again: reshard convert RUN OUT.",
                )

    write_repaired(case, results, output, sources, threads=threads, check=check, progress=progress)
    return tuple(kept)
