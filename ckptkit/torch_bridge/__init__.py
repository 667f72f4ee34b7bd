"""The only rooms that hand values to torch: `loading` plain tensors, `values` whatever else a state_dict has."""

from ckptkit.torch_bridge.loading import TorchLocation, dtype_of, tensors
from ckptkit.torch_bridge.values import state_dict_of

__all__ = ["TorchLocation", "dtype_of", "state_dict_of", "tensors"]
