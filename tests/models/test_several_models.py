"""Several models in one file, of which each fits the base: a policy and its reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.models import released
from tests.tensors import under

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write(tmp_path_factory.mktemp("b"), "llama", released.values("llama", 0))


POLICY, REFERENCE = released.values("llama", 1), released.values("llama", 2)


@pytest.mark.parametrize("flat", [True, False], ids=["torch", "dcp"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("policy.", "reference."), ("model.", "ref_model."), ("wrap.actor.", "wrap.critic.net."),
     ("", "reference.")],
)  # fmt: skip
def test_each_prefix_that_fits_is_named_and_leads_to_its_model(
    base: Path, first: str, second: str, flat: bool, tmp_path: Path
) -> None:
    state = {**under(first, POLICY), **under(second, REFERENCE)}
    run = tmp_path / "run"
    if flat:
        torch.save(state, tmp_path / "run.pt")
        run = tmp_path / "run.pt"
    else:
        dcp.save(state, checkpoint_id=run, no_dist=True)
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(run, tmp_path / "out", base=base)
    for prefix, values in ((first, POLICY), (second, REFERENCE)):
        if not prefix:
            continue
        named = prefix.removesuffix(".")
        if first:
            assert f"--prefix {named}" in str(caught.value)
        out = tmp_path / named
        reshard.convert(run, out, base=base, prefix=named)
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(written[name], value) for name, value in values.items())
    if not first:
        assert "--allow 'reference.*'" in str(caught.value)
        reshard.convert(run, tmp_path / "out", base=base, allow=["reference.*"])
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(written[name], value) for name, value in POLICY.items())


def test_one_model_beside_something_else(base: Path, tmp_path: Path) -> None:
    state = {**under("policy_net.", POLICY), "encoder.weight": torch.ones(3, 3)}
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base)
    assert caught.value.unexpected == ("encoder.weight",)
    assert "--allow 'encoder.*'" in str(caught.value)
    for number, options in enumerate(({"allow": ["encoder.*"]}, {"prefix": "policy_net"})):
        out = tmp_path / f"out{number}"
        reshard.convert(tmp_path / "run.pt", out, base=base, **options)  # type: ignore[arg-type]
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(written[name], value) for name, value in POLICY.items())
