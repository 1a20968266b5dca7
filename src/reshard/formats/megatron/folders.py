"""Which folder to read, and what is refused by its file names.

    named by the user              what is read
    run/iter_0000010, run/release  that folder
    NAME (NeMo 2)                  NAME/weights
    run/global_step_7              that of its one role, or of the role named
    run/global_step_7/actor        actor/dist_ckpt, or actor/model/dist_ckpt

A folder with `latest_checkpointed_iteration.txt` or several steps is `formats.locate`'s matter.
"""

from __future__ import annotations

from pathlib import Path

from reshard.core.regex import regex
from reshard.errors import IncompleteError, NotFoundError, UnsupportedError, brief
from reshard.formats import of_role
from reshard.formats.signs import MCORE, MCORE_COMMON, is_mcore
from reshard.storage import strict_json
from reshard.storage.paths import exists, is_file, is_folder, matching, names, own_folders

# Where the model lies in a folder that a trainer names: NeMo 2, verl up to 0.8, verl 0.9.
_MODEL = ("weights", "dist_ckpt", "model/dist_ckpt")
# Where verl 0.9 keeps what is not a model.
_STATE = ("optimizer/dist_ckpt", "extra/dist_ckpt")
# One file a rank, tensors in parts: Megatron-LM's `--ckpt-format torch`.
_RANK = regex(r"mp_rank_\d{2,}(_\d{3,})*")
_RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
# A whole model that a trainer wrote as well: Megatron-Bridge, verl.
_EXPORTS = ("hf", "../huggingface")
_TORCH = (
    "it holds a checkpoint of one file a rank (Megatron-LM's --ckpt-format torch), in which tensor "
    "parallel parts are not joined"
)


def why(path: Path) -> str | None:
    """Why `path` looks like Megatron-Core's, or None."""
    if is_file(path):
        rank = path.name in _RANK_FILES and _RANK.fullmatch(path.parent.name)
        return f"it is a rank's file of {path.parent.name}" if rank else None
    if not is_folder(path):
        return None
    if is_mcore(path):
        return "it holds a distributed checkpoint of Megatron-Core"
    if _rank_folders(path):
        return f"it holds {_rank_folders(path)[0]}/"
    for below in (*_MODEL, *_STATE):
        if is_mcore(path / below):
            return f"it holds {below}/"
    roles = _roles(path)
    return f"it holds the role {roles[0].name}/" if roles else None


def find(path: Path, role: str | None) -> Path:
    """The folder that holds the tensors, of one above it that was named: a step's or a role's.

    Raises `NotFoundError`, `UnsupportedError`, `IncompleteError`.
    """
    if is_file(path) or _rank_folders(path):
        raise UnsupportedError(
            f"{_TORCH}.",
            path=path,
            hint="Convert it to torch_dist with Megatron-LM (--ckpt-convert-format torch_dist).",
        )
    roles = [] if is_mcore(path) or _inside(path) else _roles(path)
    path = of_role(path, roles, role)
    folder = path if is_mcore(path) else _inside(path) or path
    if not is_mcore(folder):
        raise _no_model(path)
    _check(folder)
    return folder


def _inside(path: Path) -> Path | None:
    """The model's folder in one that a trainer names. Raises `NotFoundError` where two are."""
    found = [path / below for below in _MODEL if is_mcore(path / below)]
    if len(found) > 1:
        raise NotFoundError(
            f"it holds {' and '.join(str(one.relative_to(path)) for one in found)}.",
            path=path,
            hint="Name the one to read.",
        )
    return found[0] if found else None


def _roles(path: Path) -> list[Path]:
    """The folders of verl's models in a step."""
    below = (*_MODEL[1:], *_STATE)
    return [role for role in own_folders(path) if any(is_mcore(role / each) for each in below)]


def _rank_folders(path: Path) -> list[str]:
    return [
        name
        for name in names(path)
        if _RANK.fullmatch(name) and any(is_file(path / name / file) for file in _RANK_FILES)
    ]


def _check(folder: Path) -> None:
    """Refuse a save that did not finish, and backends that are not read."""
    stated = folder / MCORE
    if not is_file(stated):
        raise IncompleteError(
            f"it holds {MCORE_COMMON} and no {MCORE}, which Megatron-Core writes last: the save "
            "did not finish.",
            path=folder,
            hint="Use an earlier checkpoint, or copy the folder again if the file was left behind.",
        )
    backend = strict_json.read_file(stated).get("sharded_backend")
    if backend != "torch_dist":
        raise UnsupportedError(
            f"it is a distributed checkpoint of Megatron-Core in the format {brief(backend)}; only "
            "torch_dist is read.",
            path=folder,
            hint="Load it with the Megatron that wrote it, and save it with --ckpt-format "
            "torch_dist.",
        )
    if exists(folder / "modelopt_state"):
        raise UnsupportedError(
            "it is of a model that ModelOpt has quantised or pruned (modelopt_state), which is "
            "not supported.",
            path=folder,
            hint="Convert the checkpoint from before that, or export it with ModelOpt.",
        )


def where_weights_lie(folder: Path) -> str | None:
    """What to name instead of a folder that holds no model."""
    for parent in (folder, *folder.parents[:3]):
        for below in ("model/dist_ckpt", "model/huggingface", "huggingface", "hf"):
            one = parent / below
            if one != folder and (is_mcore(one) or any(matching(one, "*.safetensors"))):
                return f"The model lies in {one}: name that folder."
    return None


def _no_model(path: Path) -> NotFoundError:
    states = [path / below for below in _STATE if is_mcore(path / below)]
    there = " and ".join(str(state.relative_to(path)) for state in states)
    return NotFoundError(
        f"it holds no model in Megatron-Core's format, only {there}.",
        path=path,
        hint=where_weights_lie(states[0])
        or "The run saved the state of its optimizer and no model.",
    )


def export_beside(folder: Path) -> Path | None:
    """A folder with the whole model that the trainer wrote as well."""
    for below in _EXPORTS:
        one = folder.parent / below[3:] if below.startswith("../") else folder / below
        if any(matching(one, "*.safetensors")):
            return one
    return None
