"""How bytes get to the device that computes and back: pinned, on a stream of their own, in order.

On the processor there is no other side: what is sent or received is the tensor itself.
"""

import torch
from torch import Tensor


class Ferry:
    """Copies between host memory and one device; owned by the thread that computes there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = None if device.type == "cpu" else torch.Stream(device)

    def to_device(self, host: Tensor) -> Tensor:
        """A host tensor's values on the device; what is queued there from now on waits for them.

        The host goes on at once. Pinned memory is used again only after its copy has ended: torch's
        allocator sees to that.
        """
        if self._copies is None:
            return host
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
        pinned.copy_(host)
        with self._copies:
            arrived = pinned.to(self._device, non_blocking=True)
        computing = torch.accelerator.current_stream(self._device)
        computing.wait_event(self._copies.record_event())
        arrived.record_stream(computing)
        return arrived

    def to_host(self, result: Tensor) -> Tensor:
        """A device tensor's values in host memory: here, and nowhere else in a step, the host waits."""
        if self._copies is None:
            return result
        self._copies.wait_event(torch.accelerator.current_stream(self._device).record_event())
        with self._copies:
            landed = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            landed.copy_(result, non_blocking=True)
        result.record_stream(self._copies)
        self._copies.record_event().synchronize()
        return landed
