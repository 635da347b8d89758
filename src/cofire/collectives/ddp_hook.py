"""A communication hook: DDP's gradients go through HFReduce, whatever backend DDP's own group has.

    state = HFReduceHookState(wire_dtype=torch.bfloat16)
    model.register_comm_hook(state, hfreduce_hook)

Fire-Flyer (arXiv 2408.14158, IV-A) reduces gradients on the CPU while the GPUs compute; a program whose other
collectives stay with NCCL gets that with a hook. Gradients are averaged over the ranks, once, in fp32 or wider; a
``wire_dtype`` halves or quarters what is moved. Left out: error feedback for what the narrow type loses.
"""

# Annotations are not postponed here: DDP looks at those of a hook, and refuses strings.

import torch
import torch.distributed as dist
from torch.futures import Future

from cofire.collectives import autoload
from cofire.collectives.backend import HFReduceGroup
from cofire.collectives.elements import find_element
from cofire.errors import CollectiveError


class HFReduceHookState:
    """What the hook needs: the group, and the type in which gradients are moved.

    Attributes:
        group: Over which gradients are averaged.
        wire_dtype: None: the gradients' own.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, wire_dtype: torch.dtype | None = None) -> None:
        """Check the group, or make one; then all ranks of the world do this at the same time.

        Args:
            group: Of backend ``hfreduce``, with DDP's ranks; None: a new one of all ranks.
            wire_dtype: Floating-point type for the sum; None: the gradients' own.

        Raises:
            CollectiveError: The group has another backend, or the type is not one of floating point with a kernel.
        """
        if wire_dtype is not None and (find_element(wire_dtype) is None or not wire_dtype.is_floating_point):
            raise CollectiveError(
                f"wire_dtype {wire_dtype} is not a floating-point type of hfreduce; take torch.bfloat16"
            )
        found = dist.new_group(backend=autoload.NAME) if group is None else group
        if not isinstance(found, HFReduceGroup):
            raise CollectiveError(
                f"the group's backend is {dist.get_backend(group)}; give new_group(backend={autoload.NAME!r})"
            )
        self.group, self.wire_dtype = found, wire_dtype


def hfreduce_hook(state: HFReduceHookState, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks; for ``DistributedDataParallel.register_comm_hook``.

    Args:
        state: Group and wire type.
        bucket: DDP's, ``[num_elements]``; its buffer gets the average.

    Returns:
        Future of the bucket's buffer.
    """
    gradients = bucket.buffer()
    moved = gradients if state.wire_dtype is None else gradients.to(state.wire_dtype)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)

    def restore(done: Future[list[torch.Tensor]]) -> torch.Tensor:
        average = done.value()[0]
        return gradients if average is gradients else gradients.copy_(average)

    return state.group.allreduce([moved], options).get_future().then(restore)
