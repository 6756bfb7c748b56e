"""The nearest of many codes, which come in parts and are not kept.

Shapes: Q codes to find neighbours of, B of them in a block, C codes of a part, K neighbours, L latent units.
"""

import numpy as np
import torch

from vae_ds.errors import ConfigError

METRICS = ("euclidean", "cosine")
AT_ONCE = 1024  # codes of a block, on either side


class Nearest:
    """The `k` nearest codes to each of z_QL. `euclidean` is the distance, `cosine` is 1 minus the cosine.

    With equal distances, the code that came first is nearer. The memory is 2 Q k numbers and a block of 1024 by 1024,
    for any number of codes. Raises ConfigError for an unknown metric or k below 1.
    """

    def __init__(self, z_QL: torch.Tensor, k: int, metric: str = "euclidean") -> None:
        if k < 1:
            raise ConfigError(f"the number of neighbours must be at least 1; found {k}")
        if metric not in METRICS:
            raise ConfigError(f"the metric must be {' or '.join(METRICS)}; found {metric}")
        self._k, self._is_cosine = k, metric == "cosine"
        self._z_QL = self._scaled(z_QL)
        self._seen = 0
        self._distance_QK = self._z_QL.new_empty(len(z_QL), 0)
        self._index_QK = torch.empty(len(z_QL), 0, dtype=torch.int64)

    def add(self, z_CL: torch.Tensor | np.ndarray) -> None:
        """Compare the next C codes, which have the numbers after those of the codes before."""
        for part_CL in self._scaled(z_CL).split(AT_ONCE):
            index_C = torch.arange(self._seen, self._seen + len(part_CL))
            blocks = zip(
                *(every.split(AT_ONCE) for every in (self._z_QL, self._distance_QK, self._index_QK)), strict=True
            )
            nearer = [self._nearer(part_CL, index_C, *block) for block in blocks]
            self._distance_QK, self._index_QK = (torch.cat(every) for every in zip(*nearer, strict=True))
            self._seen += len(part_CL)

    def _nearer(
        self,
        part_CL: torch.Tensor,
        index_C: torch.Tensor,
        z_BL: torch.Tensor,
        distance_BK: torch.Tensor,
        index_BK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The expanded square would lose the digits of small distances.
        distance_BC = torch.cdist(z_BL, part_CL, compute_mode="donot_use_mm_for_euclid_dist")
        both_BX = torch.cat([distance_BK, distance_BC], 1)
        index_BX = torch.cat([index_BK, index_C.expand(len(z_BL), -1)], 1)
        sorted_BX, order_BX = both_BX.sort(dim=1, stable=True)
        return sorted_BX[:, : self._k], index_BX.gather(1, order_BX[:, : self._k])

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers and distances of the nearest codes so far, nearest first: int64 and float64, (Q, at most k)."""
        if self._is_cosine:
            return self._index_QK, self._distance_QK.square() / 2
        return self._index_QK, self._distance_QK

    def _scaled(self, z_XL: torch.Tensor | np.ndarray) -> torch.Tensor:
        z_XL = torch.as_tensor(z_XL).detach().to("cpu", torch.float64)
        # On the unit sphere, 1 - cos is half of the squared distance.
        return torch.nn.functional.normalize(z_XL, dim=1) if self._is_cosine else z_XL
