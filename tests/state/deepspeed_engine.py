"""DeepSpeed in training: ZeRO of one stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.state import model as models
from tests.state.engine_parts import CLIENT, KINDS, Tensors, gathered, optimizer_of
from tests.state.jobs import Job, Place


class Deepspeed:
    """ZeRO of one stage; `load_universal` where that is what it is to load."""

    def __init__(self, job: Job) -> None:
        import deepspeed

        self._job = job
        self._model = models.build(job.kind, frozen=job.frozen)
        if job.load is not None:
            models.spoil(self._model)
        muon = job.optimizer.startswith("muon")
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=self._model,
            optimizer=None if muon else optimizer_of(self._model, job),
            model_parameters=trained if muon else None,
            lr_scheduler=models.schedule,
            config=self._config(),
        )

    def _config(self) -> dict[str, Any]:
        stage = int(self._job.engine.removeprefix("zero"))
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        if self._job.optimizer in ("cpu_adam", "compiled_cpu_adam", "muon_offloaded"):
            zero["offload_optimizer"] = {"device": "cpu"}
        if self._job.optimizer.startswith("muon") and stage == 3:
            zero["reduce_scatter"] = False
        universal = self._job.load is not None and self._job.load.layout == "universal"
        more: dict[str, Any] = {}
        if self._job.optimizer.startswith("muon"):
            # Each half has a rate of its own, so that an exchange of their settings shows.
            rates = {"muon_lr": 0.02, "adam_lr": 0.01, "weight_decay": 0.1}
            more["optimizer"] = {"type": "Muon", "params": rates}
        return {
            **more,
            "train_micro_batch_size_per_gpu": models.ROWS // self._job.world,
            "zero_optimization": zero,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self._job.precision == "bfloat16"},
            "checkpoint": {"load_universal": universal},
        }

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._engine(input_ids=ids, labels=ids).loss
        self._engine.backward(loss)
        self._engine.step()
        return loss.float()

    def save(self, place: Place) -> None:
        self._engine.save_checkpoint(place.folder, client_state=dict(CLIENT))

    def load(self, place: Place) -> dict[str, object]:
        path, client = self._engine.load_checkpoint(
            place.folder, load_lr_scheduler_states=self._job.schedule
        )
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing in {place.folder}")
        tag = Path(place.folder, "latest_universal")
        if self._job.after:
            folder = Path(place.folder, tag.read_text("utf-8"))
            exec(self._job.after, {"engine": self._engine, "folder": folder})
        return {"consumed_samples": client.get("consumed_samples")}

    def tensors(self) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._job.engine in ("zero1", "zero2"):
            return self._partitioned()
        found: Tensors = {}
        if self._job.engine == "zero0":
            for name, parameter in self._trained().items():
                held = self.optimizer().state.get(parameter, {})
                found |= {f"{kind}.{name}": held[kind] for kind in KINDS if kind in held}
                found[f"param.{name}"] = parameter
            return found
        for name, parameter in self._trained().items():
            found[f"param.{name}"] = safe_get_full_fp32_param(parameter)
            for kind in KINDS if self._begun() else ():
                found[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind)
        return found

    def _trained(self) -> dict[str, Any]:
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    def _begun(self) -> bool:
        """Whether the optimizer has moments: not before its first step, nor a loaded state."""
        return any("exp_avg" in state for state in self.optimizer().state.values())

    def _partitioned(self) -> Tensors:
        """By a parameter's place in the flat buffer, not by DeepSpeed's own tables."""
        outer: Any = self._engine.optimizer
        names = {id(p): n for n, p in self._trained().items()}
        found: Tensors = {}
        for index, group in enumerate(outer.optimizer.param_groups):
            (flat,) = group["params"]
            low = outer.bit16_groups_flat[index]
            parts = {"param": outer.single_partition_of_fp32_groups[index]}
            state = self.optimizer().state.get(flat, {})
            parts |= {kind: state[kind] for kind in KINDS if kind in state}
            if self._job.optimizer == "muon_offloaded" and "momentum_buffer" in state:
                parts["momentum_buffer"] = state["momentum_buffer"]
            elif self._job.optimizer == "muon":
                found |= self._momentum(outer, index, state.get("momentum_buffer"), names)
            whole = {kind: gathered(part.detach()) for kind, part in parts.items()}
            for parameter in outer.bit16_groups[index]:
                start = (parameter.data_ptr() - low.data_ptr()) // low.element_size()
                for kind, tensor in whole.items():
                    cut = tensor[start : start + parameter.numel()].reshape(parameter.shape)
                    found[f"{kind}.{names[id(parameter)]}"] = cut
        return found

    def _momentum(
        self, outer: Any, group: int, buffer: torch.Tensor | None, names: dict[int, str]
    ) -> Tensors:
        """Muon's, of the parameters in each rank's partition; those of several must be the same."""
        mine, at = {}, 0
        for parameter in outer.params_in_partition[group] if buffer is not None else ():
            cut = buffer[at : at + parameter.numel()]  # type: ignore[index]
            mine[f"momentum_buffer.{names[id(parameter)]}"] = cut.reshape(parameter.shape)
            at += parameter.numel()
        everyone: list[Tensors] = [{} for _ in range(self._job.world)]
        distributed.all_gather_object(everyone, mine)
        found: Tensors = {}
        for theirs in everyone:
            for name, tensor in theirs.items():
                if not torch.equal(found.setdefault(name, tensor), tensor):
                    raise RuntimeError(f"{name}: two ranks differ")
        return found

    def optimizer(self) -> torch.optim.Optimizer:
        inner: Any = self._engine.optimizer
        return getattr(inner, "optimizer", inner)

    def end(self) -> None:
        self._engine.destroy()
