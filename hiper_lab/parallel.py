"""One training on several processes, by accelerate: the same update as on one.

``accelerate launch`` starts the processes; each plays and trains its share of the episodes. What is
a matter of the whole batch stays one: every process knows all trajectories and values, so credit,
its statistics and the denominators of the loss are the batch's own, and gradients are summed.
With DistributedDataParallel every process holds the model; with FSDP it holds a slice of every
weight, gradient and moment, and the whole weights only while it plays.

Left out on purpose: starting processes (accelerate), pipeline and tensor parallelism.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hiper_lab.policy import Policy


class Team:
    """The processes of this training; alone, without ``accelerate launch``, it does nothing.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.

    Raises:
        ValueError: If they were launched for something else than DDP or FSDP 2.

    Example:
        >>> alone = Team()
        >>> alone.size, alone.main, alone.share(6, unit=2), alone.gather(["mine"])
        (1, True, range(0, 6), ['mine'])
    """

    def __init__(self):
        self.rank, self.size, self._accelerator, self._model = 0, 1, None, None
        self.device, self.sharded = "auto", False
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # while the critic warms up, no gradient reaches the policy; precision is the policy's
        idle = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[idle])
        kind = self._accelerator.distributed_type.value
        self.sharded = kind == "FSDP" and self._accelerator.is_fsdp2
        if kind not in ("MULTI_CPU", "MULTI_GPU") and not self.sharded:
            version = " 1" if kind == "FSDP" else ""
            raise ValueError(
                f"launched for {kind}{version}, expected MULTI_CPU, MULTI_GPU or FSDP with "
                "fsdp_version: 2; see accelerate config"
            )
        if self.sharded:
            # every process loads the model: tied weights do not survive sending them around
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
            self._accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self.rank, self.size = self._accelerator.process_index, self._accelerator.num_processes
        self.device = str(self._accelerator.device)

    @property
    def main(self) -> bool:
        """Only this process writes files."""
        return self.rank == 0

    def share(self, count: int, unit: int = 1) -> range:
        """Which of ``count`` things are this process's, in whole units; as even as can be."""
        units = count // unit
        first, last = (units * rank // self.size for rank in (self.rank, self.rank + 1))
        return range(first * unit, last * unit)

    def gather(self, mine: list) -> list:
        """The lists of all processes, one after another, in each process."""
        if self.size == 1:
            return mine
        from accelerate.utils import gather_object

        return gather_object(mine)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            self._accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------- training

    def prepare(
        self, policy: Policy, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What to call in place of the policy, and the optimiser to step."""
        if self.size == 1:
            return policy, optimizer
        self._model, optimizer = self._accelerator.prepare(policy, optimizer)
        if self.sharded:  # the outermost module has to be the first one that runs
            with torch.no_grad():
                self._model(Policy.hidden, torch.zeros(1, 1, dtype=torch.long, device=self.device))
            self._model.reshard()
        return self._model, optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a loss's gradient to those of all processes; complete after the ``last`` one.

        Every process has to come here equally often.
        """
        if self.size == 1:
            loss.backward()
            return
        later = nullcontext() if last or self.sharded else self._accelerator.no_sync(self._model)
        with later:  # accelerate's engines take means over processes
            self._accelerator.backward(loss * self.size)

    @contextmanager
    def whole(self, policy: Policy) -> Iterator[None]:
        """Hold the whole weights: processes may then run the model out of step, without gradient.

        Sampling needs it, as no two processes write equally many tokens.
        """
        inner = [m for m in policy.modules() if isinstance(m, FSDPModule) and m is not policy]
        if self.sharded:
            for module in (policy, *inner):
                module.unshard()
            for module in inner:
                module.set_reshard_after_forward(False)
        try:
            yield
        finally:
            if self.sharded:
                for module in inner:
                    module.set_reshard_after_forward(True)
                for module in (policy, *inner):
                    module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, in one piece; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, placed and spread like a parameter."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh = parameter.device_mesh
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )
