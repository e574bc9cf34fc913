"""Names for the types that several modules share."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import mtf, tf

LaidOut = Any  # a MeshImpl's LaidOutTensor: a slice on each processor
ShapeLike = mtf.Shape | Iterable[mtf.Dimension]
Tensor = np.ndarray | tf.Tensor | mtf.Tensor
RowValue = float | Tensor  # one for all rows, or one a row
