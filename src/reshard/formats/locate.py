"""Find the checkpoint in a folder that a user named.

A path that a format claims is read itself. Otherwise the folders below it are searched, three
levels down and never inside a checkpoint: `results/run` leads to `results/run/_actor/global_step6`.
If several saves lie side by side, the newest complete one is taken, and the catalog's findings say
so; saves of different models are an error that lists them.

Trainers export models among their checkpoints. The HF Trainer (transformers 5.23, trainer.py):

    run/model.safetensors                     save_model() at the end: taken, and the rest named
    run/checkpoint-20/model.safetensors       the same weights again, in the type of the module
    run/checkpoint-20/global_step20/          DeepSpeed's save, with `latest`: taken
    run/checkpoint-20/pytorch_model_fsdp_0/   or that of FSDP: taken

verl and Megatron-LM write the number of the last finished save into a file beside the saves,
`latest_checkpointed_iteration.txt`; that save takes precedence over newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reshard import formats
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.errors import IncompleteError, NotFoundError
from reshard.formats import OPTIMIZER, tags
from reshard.formats.info import named
from reshard.naming.lora.config import NAME as ADAPTER_CONFIG
from reshard.naming.part import catalog_under
from reshard.storage.local import Sources, snapshot
from reshard.storage.paths import is_file, is_folder, listing, own_folders, real, status

_DEPTH = 3
# A run's folder has tens of entries; more than this is somebody's home directory. 0.6 ms each.
_MAX_FOLDERS = 4000
# One shard of several, of safetensors or torch.save files.
_SHARD = regex(r".*-\d{5}-of-(\d{5})\.(?:safetensors|bin)")
# Written last, once a save is whole.
TRACKER = "latest_checkpointed_iteration.txt"
# LightRFT keeps actor and critic side by side; the actor is the default.
ACTOR = "_actor"


class Candidate(Struct, frozen=True):
    """A checkpoint below a folder, with the formats that claim it, each with its reason."""

    path: Path
    claims: Mapping[str, str]

    @property
    def format(self) -> str:
        """The checkpoint's format; empty where it could be of several."""
        return formats.meant(self.claims) or ""

    @property
    def age(self) -> tuple[int, float]:
        """Ascending with time: the number in the save's name, then when it was written."""
        return (tags.number_of(self.path.name), status(self.path).st_mtime)


def read(path: Path, sources: Sources, selection: formats.Selection) -> Catalog:
    """The catalog of the checkpoint at `path`, or of the selected one below it.

    Raises what the format's reader raises; `NotFoundError` where there is none, or several that
    are not saves of one run, `NamesError` where nothing lies under the prefix.
    """
    catalog = _read(snapshot(path), sources, selection)
    if selection.prefix and not named(catalog.format).finds_model:
        return catalog_under(catalog, selection.prefix)
    return catalog


def _read(path: Path, sources: Sources, selection: formats.Selection) -> Catalog:
    if not is_folder(path):
        catalog = _load(path, formats.detect(path), {}, sources, selection)
        return replace(catalog, findings=(*catalog.findings, *_of_file(path)))
    claims = formats.claims(path)
    exported = bool(claims) and _is_export(formats.meant(claims))
    # Above a run's checkpoints lies the model that was exported at its end; no tag selects it.
    if claims and not (exported and selection.tag not in (None, real(path).name)):
        catalog = _load(path, formats.told(path, claims), claims, sources, selection)
        return _and_below(catalog, path) if exported else catalog
    below = _below(path, _DEPTH)
    if not below:
        # says what is there instead
        return _load(path, formats.told(path, claims), claims, sources, selection)
    tracked = _tracked(below[0].path.parent, sources)
    chosen, passed_over = _choose(path, below, selection.tag, tracked), []
    for save in chosen:
        try:
            inside = _inside(save, selection.tag)
            meant = replace(selection, tag=inside)
            catalog = _load(save.path, save.format, save.claims, sources, meant)
        except IncompleteError as error:
            passed_over.append(error)
            continue
        lost = (
            Finding("incomplete-skipped", f"skipped, because it is incomplete: {error}")
            for error in passed_over
        )
        taken = _taken(save, chosen, below, selection.tag, tracked, catalog)
        return replace(catalog, findings=(*taken, *lost, *catalog.findings))
    raise passed_over[0]


def _of_file(path: Path) -> tuple[Finding, ...]:
    """The finding that a file is one shard of several."""
    shard = _SHARD.fullmatch(path.name)
    if shard is None or int(shard[1]) < 2:
        return ()
    message = f"{path} is one of {int(shard[1])} shards: for the whole model, name its folder."
    return (Finding("one-shard", message, subject=path.name),)


def _load(
    path: Path,
    format_: str,
    claims: Mapping[str, str],
    sources: Sources,
    selection: formats.Selection,
) -> Catalog:
    """The checkpoint at `path`. A model exported beside it is named in the findings.

    Only DeepSpeed's reader takes a tag, since it alone keeps several saves in one folder. `claims`
    are the formats that claim a folder.
    """
    tag = selection.tag
    if tag is not None and tag == real(path).name and not is_folder(path / tag):
        selection = replace(selection, tag=None)
    elif tag is not None and not named(format_).has_tags:
        raise NotFoundError(
            f"there is no save {tag!r} here: it is one checkpoint, not a folder of several.",
            path=path,
            hint="Leave out --tag, or name the folder above.",
        )
    if selection.role is not None and not named(format_).has_roles:
        raise NotFoundError(
            f"there is no role {selection.role!r} here: it is the checkpoint of one model.",
            path=path,
            hint="Leave out --role.",
        )
    reader = formats.load(format_)
    if _is_export(format_) or not any(map(_is_export, claims)):
        return reader.read(path, sources, selection)
    try:
        catalog = reader.read(path, sources, selection)
    except IncompleteError as error:
        raise _or_the_export(error) from None
    beside = f"{path} also holds an exported model; the training checkpoint in it was taken."
    return replace(catalog, findings=(*catalog.findings, Finding("export-beside", beside)))


def _or_the_export(error: IncompleteError) -> IncompleteError:
    """The error of a training checkpoint that has an exported model beside it."""
    export = "Or convert the model that was exported beside it: name its file."
    return IncompleteError(
        error.message,
        path=error.path,
        tensor=error.tensor,
        hint=export if error.hint is None else f"{error.hint} {export}",
    )


def _and_below(catalog: Catalog, path: Path) -> Catalog:
    """An exported model's catalog, which names the training checkpoints in the same folder."""
    below: list[Candidate] = []
    with suppress(NotFoundError):  # too many to look at, which does not matter here
        below = [save for save in _below(path, 1) if not _is_export(save.format)]
    if not below:
        return catalog
    newest = max(below, key=lambda save: save.age).path
    message = (
        f"of {path}, the exported model was taken. There are {len(below)} training checkpoints "
        f"as well; to convert one, name it: {newest}."
    )
    return replace(catalog, findings=(*catalog.findings, Finding("checkpoints-below", message)))


def _is_export(format_: str | None) -> bool:
    """Whether it is a format of whole models; the name is empty if the format is ambiguous."""
    return bool(format_) and named(format_ or "").exported


def has_tags(format_: str | None) -> bool:
    """Whether folders of a format hold several saves, each by its tag."""
    return bool(format_) and named(format_ or "").has_tags


def actors(saves: list[Candidate], root: Path) -> list[Candidate]:
    """The saves of the actor below `root`; all of them where none is an actor's."""
    return [save for save in saves if ACTOR in save.path.relative_to(root).parts] or saves


def saves(path: Path) -> list[Candidate]:
    """Checkpoints below a folder; exported models only where there is nothing else."""
    return _training(_below(path, _DEPTH))


def _training(checkpoints: list[Candidate]) -> list[Candidate]:
    training = [save for save in checkpoints if not _is_export(save.format)]
    return training or checkpoints


def _below(path: Path, depth: int) -> list[Candidate]:
    """All checkpoints below a folder, but for optimizers' beside those of their models.

    accelerate before 0.24 gave the optimizer a folder of its own, and so do many who call dcp.save
    twice.
    """
    found = list(_walk(path, depth, [_MAX_FOLDERS]))
    return [save for save in found if not OPTIMIZER.fullmatch(save.path.name)] or found


def _walk(folder: Path, depth: int, budget: list[int]) -> Iterator[Candidate]:
    for child in own_folders(folder):
        if child.name.startswith("."):
            continue
        budget[0] -= 1
        if budget[0] < 0:  # the newest save may be one of those that were not looked at
            raise NotFoundError(
                f"more than {_MAX_FOLDERS} folders lie below it, too many to look for checkpoints "
                "in all of them.",
                path=folder,
                hint="Name the folder that holds the checkpoint's files, or the folder above it.",
            )
        claims = formats.claims(child)
        if claims:
            yield Candidate(child, claims)
        elif depth > 1:
            yield from _walk(child, depth - 1, budget)


def _tracked(folder: Path, sources: Sources) -> str | None:
    """The last save that was finished, as the run's own file states it: its number, or `release`,
    which Megatron-LM calls a converted model."""
    path = folder / TRACKER
    if not is_file(path):
        return None
    source = sources.open(path)
    text = source.read(0, min(source.size, 64)).strip()
    return text.decode() if re.fullmatch(rb"\d{1,18}|release", text) else None


def _is_tracked(save: Candidate, tracked: str | None) -> bool:
    if tracked is None or not tracked.isdecimal():
        return save.path.name == tracked
    return save.age[0] == int(tracked)


def _choose(
    path: Path, saves: list[Candidate], tag: str | None, tracked: str | None = None
) -> list[Candidate]:
    """The saves to try, the one that the run's own file names first, then the newest."""
    saves = _training(saves if tag is None else _tagged(path, saves, tag))
    saves = actors(saves, path)
    if len({save.path.parent for save in saves}) > 1:
        raise _several(path, saves, "it holds checkpoints of several models or runs")
    if len(saves) > 1 and all(_is_unnumbered_adapter(save) for save in saves):
        raise _several(path, saves, "it holds several adapters")
    unclear = [save for save in saves if not save.format]
    if unclear:
        formats.told(unclear[0].path, unclear[0].claims)  # raises, naming both formats
    return sorted(saves, key=lambda save: (_is_tracked(save, tracked), save.age), reverse=True)


def _is_unnumbered_adapter(save: Candidate) -> bool:
    """PEFT puts each adapter of a model into a folder of its name; steps have numbers."""
    return save.age[0] < 0 and is_file(save.path / ADAPTER_CONFIG)


def _tagged(path: Path, saves: list[Candidate], tag: str) -> list[Candidate]:
    """The saves that are called `tag`, have that number, or hold a DeepSpeed save of that name."""
    found = [save for save in saves if save.path.name == tag or _inside(save, tag)]
    if not found and tag.isdecimal():
        found = [save for save in saves if save.age[0] == int(tag)]
    if not found and tag == tags.LATEST:
        found = _training(saves)
    if not found:
        names = [save.path.name for save in saves]
        what = f"none of its checkpoints is called {tag!r} or holds it"
        raise _several(path, saves, what, tags.near(tag, names))
    return found


def _inside(save: Candidate, tag: str | None) -> str | None:
    """The save that a tag selects in a folder of several; None: the tag selects the folder
    itself."""
    if tag is None or not has_tags(save.format):
        return None
    inside = [child.name for child in listing(save.path) if is_folder(child)]
    found = tag if is_folder(save.path / tag) else None
    by_number = None if tags.number_of(save.path.name) >= 0 else tags.meant(tag, inside)
    return found or by_number


def _several(path: Path, saves: list[Candidate], what: str, near: str = "") -> NotFoundError:
    there = tags.listed([str(save.path.relative_to(path)) for save in saves])
    return NotFoundError(f"{what}: {there}.", path=path, hint=near or "Name one of them.")


def _taken(
    save: Candidate,
    chosen: list[Candidate],
    checkpoints: list[Candidate],
    tag: str | None,
    tracked: str | None,
    catalog: Catalog,
) -> list[Finding]:
    """Which of the checkpoints was taken, and which exported model is newer than it."""
    saves = _training(checkpoints)
    tagged = catalog.origin.tag not in (None, *save.path.parts)
    inside = f", tag {catalog.origin.tag}" if tagged else ""
    newer = [
        other
        for other in checkpoints
        if other not in saves and other.path.parent == save.path.parent and other.age > save.age
    ]
    message = f"using {save.path}{inside}{_why(save, chosen, len(saves), tag, tracked)}."
    findings = [Finding("checkpoint-taken", message, subject=str(save.path))]
    if tag is None and newer:
        newest = max(newer, key=lambda other: other.age).path
        message = f"{newest} is newer, and an exported model alone; to convert it, name it."
        findings.append(Finding("newer-export", message, subject=str(newest)))
    return findings


def _why(
    save: Candidate, chosen: list[Candidate], number: int, tag: str | None, tracked: str | None
) -> str:
    """Why this one of `number` checkpoints was taken, in brackets."""
    if number == 1:
        return ""
    if tag not in (None, tags.LATEST):
        return f" (named by --tag, one of {number})"
    if _is_tracked(save, tracked):
        return f" (named by {TRACKER}, one of {number})"
    why = f"one of {number}" if len(chosen) == 1 else f"the newest complete one of {len(chosen)}"
    if tracked is not None:
        why += f"; {TRACKER} names {tracked}, which was not found or is incomplete"
    return f" ({why})"
