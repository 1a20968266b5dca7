"""The oracle against itself: where DeepSpeed's own tools can read a checkpoint, they agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.oracle.cache import Array, Oracle
from tests.oracle.recipes import RECIPES, Recipe


def _ids(recipes: list[Recipe]) -> list[str]:
    return [recipe.name for recipe in recipes]


# What zero_to_fp32 0.19.8 cannot read, or reads wrongly: stage 0, BF16_Optimizer, legacy files.
READABLE = [
    recipe
    for recipe in RECIPES
    if recipe.stage > 0 and "data_types" not in recipe.config and "checkpoint" not in recipe.config
]


def same(mine: Array, theirs: Array) -> bool:
    """Same dtype, shape and bits."""
    return (
        mine.dtype == theirs.dtype
        and mine.shape == theirs.shape
        and mine.tobytes() == theirs.tobytes()
    )


@pytest.mark.parametrize("recipe", READABLE, ids=_ids(READABLE))
def test_zero_to_fp32_reads_the_truth(oracle: Oracle, recipe: Recipe, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for index, saved in enumerate(oracle[recipe.name].saves):
        # Under a plain name: zero_to_fp32 globs the tag's path, so a tag with `[` finds nothing.
        (tmp_path / str(index)).symlink_to(saved.path)
        state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag=str(index))
        for name, master in saved.masters().items():
            assert same(master, state[name].detach().numpy()), name


@pytest.mark.parametrize("recipe", RECIPES, ids=_ids(list(RECIPES)))
def test_truth_holds_every_tensor(oracle: Oracle, recipe: Recipe) -> None:
    saved = oracle[recipe.name].last
    masters, module = saved.masters(), saved.module()
    tied, frozen = saved.facts["tied"], saved.facts["frozen"]
    assert set(masters) == set(module) - set(tied) - set(frozen) - set(saved.facts["buffers"])
    for name, master in masters.items():
        assert master.dtype == np.float32
        assert same(master.astype(module[name].dtype), module[name]), name
    for alias, name in tied.items():
        assert same(module[alias], module[name])


@pytest.mark.parametrize("recipe", RECIPES, ids=_ids(list(RECIPES)))
def test_masters_are_not_just_the_module(oracle: Oracle, recipe: Recipe) -> None:
    """A reader that took the bf16 weights for the masters must fail somewhere."""
    saved = oracle[recipe.name].last
    module = saved.module()
    finer = sum(
        not np.array_equal(master, module[name].astype(np.float32))
        for name, master in saved.masters().items()
    )
    trained = any(save.steps for save in recipe.saves)
    assert (finer > 0) == (recipe.dtype == "bfloat16" and trained)
