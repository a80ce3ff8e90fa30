"""Let ``torch.load(weights_only=True)`` read mmengine's checkpoints.

Since torch 2.6 a checkpoint is read by an unpickler that admits tensors and plain containers only. Beside those, a
training checkpoint of mmengine holds its message hub, ``HistoryBuffer`` objects over numpy arrays, and, with the
one-cycle schedule, that scheduler's two annealing functions. Exactly these are admitted here, through torch's public
allow-list; nothing of torch is replaced, and a file that asks for anything else is refused before any of it runs.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

# numpy moved these in version 2, and a checkpoint names them as the numpy that wrote it did
try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:
    from numpy.core.multiarray import _reconstruct, scalar

# a function of a class is pickled as getattr(class, name)
FUNCTIONS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def getattr_of_mmengine(obj: Any, name: str) -> Any:
    """Stand in for ``getattr`` in checkpoints: it knows the functions that mmengine's own checkpoints ask for.

    Args:
        obj: The class that the file asks a function of.
        name: The function's name.

    Returns:
        The function.

    Raises:
        pickle.UnpicklingError: For any other object or name.
    """
    if isinstance(obj, type) and name in FUNCTIONS.get(obj, ()):
        return getattr(obj, name)
    raise pickle.UnpicklingError(f'a checkpoint may not ask for getattr({obj!r}, {name!r})')


def register_safe_globals() -> None:
    """Admit what mmengine's checkpoints contain; safe to call again."""
    numpy_functions = [
        (function, f'numpy.{package}.multiarray.{function.__name__}')
        for function in (_reconstruct, scalar)
        for package in ('core', '_core')
    ]
    dtypes = [type(np.dtype(kind)) for kind in ('float32', 'float64', 'int32', 'int64', 'bool')]
    torch.serialization.add_safe_globals(
        [*FUNCTIONS, (getattr_of_mmengine, 'builtins.getattr'), np.ndarray, np.dtype, *dtypes] + numpy_functions
    )
