"""FSDP1 or FSDP2 in training, saved as the frameworks around it save."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd

from tests.state import model as models
from tests.state.engine_parts import CLIENT, KINDS, Tensors, parts_of
from tests.state.jobs import Job, Layout, Place


class Fsdp:
    """FSDP1 or FSDP2, float32 or with a policy of mixed precision."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plain = models.build(job.kind, frozen=job.frozen)
        if job.load is not None:
            models.spoil(self._plain)
        self._model = self._wrapped()
        self._optimizer = models.optimizer(self._model, job)
        self._schedule = models.schedule(self._optimizer)

    def _wrapped(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
        from torch.distributed.fsdp import fully_shard as shard

        if self._job.engine == "fsdp1":
            return FullyShardedDataParallel(self._plain, **self._fsdp1())
        options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (self._job.world,))}
        if self._job.precision == "bfloat16":
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        inner = self._plain.get_base_model() if self._job.kind == "lora" else self._plain
        for layer in inner.model.layers:
            shard(layer, **options)
        # Embedding and head are one tied weight: both belong to the root's group.
        return shard(self._plain, **options)

    def _fsdp1(self) -> dict[str, Any]:
        """How FSDP1 is made."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import ShardingStrategy
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        job = self._job
        options: dict[str, Any] = {
            "use_orig_params": not job.flat, "device_id": torch.device("cpu")
        }  # fmt: skip
        if job.wrapped:
            layer = type(self._plain.model.layers[0])
            options["auto_wrap_policy"] = ModuleWrapPolicy({layer})
        if job.hybrid:
            names = ("replicate", "shard")
            mesh = init_device_mesh("cpu", (2, job.world // 2), mesh_dim_names=names)
            strategy = ShardingStrategy.HYBRID_SHARD
            options |= {"device_mesh": mesh, "sharding_strategy": strategy}
        return options

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._model(input_ids=ids, labels=ids).loss
        loss.backward()
        if self._job.engine == "fsdp1":
            self._model.clip_grad_norm_(1.0)
        else:
            trained = [p for p in self._model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.float()

    def save(self, place: Place) -> None:
        """LightRFT's statements (FSDPV2Strategy.save_ckpt), accelerate's functions, torch's own."""
        folder = Path(place.folder)
        rank0 = distributed.get_rank() == 0
        folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        model, inner = self._model, self._optimizer
        if place.layout == "lightrft":
            dcp.save(sd.get_model_state_dict(model), checkpoint_id=folder)
            state = sd.get_optimizer_state_dict(model, inner)
            dcp.save(state, checkpoint_id=folder / "optim_states")
            torch.save(dict(CLIENT), folder / "client_state.pt")
            torch.save(self._schedule.state_dict(), folder / "scheduler_state.pt")
        elif place.layout == "verl":
            self._save_verl(folder)
        elif place.layout == "ids":
            self._save_ids(folder)
        elif place.layout == "script":
            with self._sharded():
                rank = distributed.get_rank()
                torch.save(model.state_dict(), folder / f"model_rank{rank}.pt")
                torch.save(inner.state_dict(), folder / f"optim_rank{rank}.pt")
            if rank0:
                torch.save(self._schedule.state_dict(), folder / "scheduler.pt")
        elif place.layout in ("accelerate", "full", "ranks", "local"):
            from accelerate.utils import fsdp_utils

            accelerate = _accelerate(self._job, place.layout)
            together = place.layout != "ranks"
            fsdp_utils.save_fsdp_model(*accelerate, model, place.folder, use_dcp=together)
            fsdp_utils.save_fsdp_optimizer(
                *accelerate, inner, model, place.folder, use_dcp=together
            )
            if rank0:
                torch.save(self._schedule.state_dict(), folder / "scheduler.pt")
        else:
            state = sd.get_optimizer_state_dict(model, inner, options=_options(place))
            both = {"model": sd.get_model_state_dict(model), "optimizer": state}
            dcp.save(both, checkpoint_id=folder)
            if rank0:
                torch.save(self._schedule.state_dict(), folder / "scheduler.pt")

    def _save_verl(self, folder: Path) -> None:
        """verl's statements (FSDPCheckpointManager.save_checkpoint)."""
        name = f"world_size_{self._job.world}_rank_{distributed.get_rank()}.pt"
        with self._sharded():
            torch.save(self._model.state_dict(), folder / f"model_{name}")
            torch.save(self._optimizer.state_dict(), folder / f"optim_{name}")
            extra = {"lr_scheduler": self._schedule.state_dict(), "rng": None}
            torch.save(extra, folder / f"extra_state_{name}")

    def _sharded(self) -> Any:
        """In which a state dict is the rank's part: so it is of FSDP2, and FSDP1 is told so."""
        from torch.distributed import fsdp

        if self._job.engine != "fsdp1":
            return contextlib.nullcontext()
        return fsdp.FullyShardedDataParallel.state_dict_type(
            self._model,
            fsdp.StateDictType.SHARDED_STATE_DICT,
            fsdp.ShardedStateDictConfig(offload_to_cpu=False),
            fsdp.ShardedOptimStateDictConfig(offload_to_cpu=False),
        )

    def _save_ids(self, folder: Path) -> None:
        """A script's: the full state dicts of FSDP1, the optimizer's by numbers."""
        from torch.distributed.fsdp import FullStateDictConfig, OptimStateKeyType, StateDictType
        from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1

        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with Fsdp1.state_dict_type(self._model, StateDictType.FULL_STATE_DICT, whole):
            weights = self._model.state_dict()
            state = Fsdp1.optim_state_dict(self._model, self._optimizer)
        numbers = Fsdp1.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self._model)
        if distributed.get_rank() == 0:
            torch.save(weights, folder / "pytorch_model.bin")
            torch.save(numbers, folder / "optimizer.pt")
            order = [_clean(n) for n, _ in self._model.named_parameters()]
            number = {name: at for at, name in enumerate(order)}
            Path(self._job.out).mkdir(parents=True, exist_ok=True)
            named = {
                number[name]: name for group in state["param_groups"] for name in group["params"]
            }
            torch.save(named, Path(self._job.out) / "numbers.pt")

    def load(self, place: Place) -> dict[str, object]:
        folder, client = Path(place.folder), {}
        model, inner = self._model, self._optimizer
        if place.layout == "accelerate":
            from accelerate.utils import fsdp_utils

            accelerate = _accelerate(self._job)
            fsdp_utils.load_fsdp_model(*accelerate, model, place.folder)
            fsdp_utils.load_fsdp_optimizer(*accelerate, inner, model, place.folder)
        else:
            weights = sd.get_model_state_dict(model)
            state = sd.get_optimizer_state_dict(model, inner, options=_options(place))
            if place.layout == "lightrft":  # FSDPV2Strategy.load_ckpt
                dcp.load(weights, checkpoint_id=folder)
                sd.set_model_state_dict(model, weights)
                dcp.load(state, checkpoint_id=folder / "optim_states")
                client = torch.load(folder / "client_state.pt")
            elif place.layout == "torchtitan":
                schedule = {"last_epoch": 0}
                both = {**weights, "optimizer": state, "lr_scheduler": schedule}
                dcp.load(both, checkpoint_id=folder)
                sd.set_model_state_dict(model, {name: both[name] for name in weights})
                state = both["optimizer"]
                self._schedule.last_epoch = both["lr_scheduler"]["last_epoch"]
            else:
                both = {"model": weights, "optimizer": state}
                dcp.load(both, checkpoint_id=folder)
                sd.set_model_state_dict(model, both["model"])
                state = both["optimizer"]
            sd.set_optimizer_state_dict(model, inner, state, options=_options(place))
        if place.layout == "torchtitan":
            return client
        name = "scheduler_state.pt" if place.layout == "lightrft" else "scheduler.pt"
        self._schedule.load_state_dict(torch.load(folder / name))
        return client

    def tensors(self) -> Tensors:
        found: Tensors = {}
        options = sd.StateDictOptions(full_state_dict=True)
        weights = sd.get_model_state_dict(self._model, options=options)
        trained = {n for n, p in self._plain_names() if p.requires_grad}
        if self._job.flat:  # whose parameters have no names; all are trained
            tied = weights.keys() - dict(models.build(self._job.kind).named_parameters()).keys()
            trained = weights.keys() - tied
        found |= {f"param.{n}": t for n, t in weights.items() if n in trained}
        if self._job.engine == "fsdp1":
            # torch 2.13 gathers exp_avg_sq in exp_avg's place there, on the CPU.
            return found | (self._of_flat() if self._job.flat else self._of_slices(weights))
        for name, parameter in self._model.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            found |= {f"{kind}.{name}": state[kind].full_tensor() for kind in KINDS if state}
        return found

    def _of_flat(self) -> Tensors:
        """FSDP1's moments, cut out of its flat parameters as it says that they lie in them."""
        from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1

        found: Tensors = {}
        for name, module in self._model.named_modules():
            if not isinstance(module, Fsdp1):
                continue
            flat: Any = module._handle.flat_param
            state = self._optimizer.state.get(flat, {})
            for kind in KINDS if state else ():
                parts = parts_of(state[kind], module.process_group)
                pieces = torch.cat(parts).split_with_sizes(
                    [*flat._numels, sum(map(len, parts)) - sum(flat._numels)]
                )
                for fqn, shape, piece in zip(flat._fqns, flat._shapes, pieces, strict=False):
                    whole = _clean(f"{name}.{fqn}" if name else fqn)
                    found[f"{kind}.{whole}"] = piece.reshape(shape)
        return found

    def _of_slices(self, weights: Tensors) -> Tensors:
        """FSDP1's moments, of the slices of each parameter, which follow each other."""
        found: Tensors = {}
        for name, parameter in self._plain_names():
            state = self._optimizer.state.get(parameter, {})
            for kind in KINDS:
                parts: list[Any] = [None] * self._job.world
                distributed.all_gather_object(parts, state.get(kind))
                held = [part for part in parts if part is not None]
                if held:
                    found[f"{kind}.{name}"] = torch.cat(held).reshape(weights[name].shape)
        return found

    def _plain_names(self) -> Any:
        for name, parameter in self._model.named_parameters():
            yield _clean(name), parameter

    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def end(self) -> None:
        del self._model, self._plain, self._optimizer, self._schedule


def _clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def _options(place: Place) -> Any:
    return sd.StateDictOptions(flatten_optimizer_state_dict=place.layout in ("flat", "torchtitan"))


def _accelerate(job: Job, layout: Layout = "accelerate") -> tuple[Any, Any]:
    """What accelerate's own functions ask of their plugin and of their accelerator."""
    from accelerate import PartialState
    from torch.distributed import fsdp

    PartialState(cpu=True)
    kind = {
        "full": fsdp.StateDictType.FULL_STATE_DICT,
        "local": fsdp.StateDictType.LOCAL_STATE_DICT,
    }.get(layout, fsdp.StateDictType.SHARDED_STATE_DICT)
    configs: Any = fsdp.ShardedStateDictConfig, fsdp.ShardedOptimStateDictConfig
    if layout == "local":
        configs = fsdp.LocalStateDictConfig, fsdp.LocalOptimStateDictConfig
    plugin = types.SimpleNamespace(
        state_dict_type=kind,
        fsdp_version=int(job.engine[-1]),
        state_dict_config=configs[0](offload_to_cpu=False),
        optim_state_dict_config=configs[1](offload_to_cpu=False),
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,
    )
    rank = distributed.get_rank()
    accelerator = types.SimpleNamespace(
        num_processes=distributed.get_world_size(),
        process_index=rank,
        is_main_process=rank == 0,
        wait_for_everyone=distributed.barrier,
    )
    return plugin, accelerator
