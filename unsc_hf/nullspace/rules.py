"""How many directions of the retained rows are kept: pure linear algebra on second moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import scipy.linalg
import torch
from torch import Tensor

from ..errors import UNSCError
from ..models.layers import ProtectedLayer
from ..utils.distributed import dealt
from .moments import SecondMoment, total_moment
from .subspace import LayerSubspace, Subspace

RULES = ("energy", "class_energy", "rank", "ratio", "released_ramp")

# Rounding of float32 activations: singular values below this share of the largest are noise of the forward pass itself.
_ROUNDING = 8 * torch.finfo(torch.float32).eps

Basis = tuple[Tensor, tuple[int, ...]]  # Orthonormal columns (groups, width, width), and how many of them are kept.


def build_subspace(
    moments: Mapping[str, Mapping[str, SecondMoment]],
    module_keys: Mapping[str, str],
    *,
    rule: str = "energy",
    energy: float = 0.95,
    size: float | None = None,
    forget: Mapping[str, SecondMoment] | None = None,
    device: torch.device | str | None = None,
    together: bool = False,
) -> Subspace:
    """Subspace of the retained rows for every layer input.

    Args:
        moments: `moments[class][key]` of the *retained* classes.
        module_keys: key by module name.
        rule: how many directions are kept.
            "energy": the smallest k whose squared singular values reach the fraction `energy` (paper, section 4.1);
            1.0 means everything above the rounding of float32 activations, relative to the largest. The classes'
            moments are added, which is exact.
            "class_energy": the paper's way to join classes: such a basis for each class, all concatenated, and an SVD
            whose left singular vectors above rounding are kept.
            "rank": the `size` largest directions.
            "ratio": free are the directions in which a forgotten row carries more than `size` times the energy of a
            retained row (generalised eigenvectors of the two moments); needs `forget`.
            "released_ramp": the authors' released code, energy 0.97 + 0.003 * class id for each class (capped at 1),
            bases concatenated; class names must be ids.
        forget: moments of the forgotten rows by key, for rule "ratio" and for the report.
        device: where to decompose, in float64, layer after layer; None means where the moments are. The result is on
            the CPU.
        together: the processes, all of which call this, take the layers in turn, and each gets the same bits of all.

    Raises:
        UNSCError: an unknown rule, or a value out of range.
    """
    check_energy(energy)
    if rule not in RULES:
        raise UNSCError(f"subspace_rule: {rule!r} does not exist; choose from {', '.join(RULES)}.")
    if rule == "rank" and (size is None or size < 0):
        raise UNSCError(f"subspace_size: {size!r} given; rule 'rank' needs a number of directions, 0 or more.")

    def decompose(key: str) -> LayerSubspace:
        place = next(iter(moments.values()))[key].device if device is None else torch.device(device)
        per_class = {group: by_key[key].to(place) for group, by_key in moments.items()}
        retained, forgotten = total_moment(per_class.values()), None if forget is None else forget[key].to(place)
        if rule == "ratio":
            basis, ranks = _ratio_basis(retained, forgotten, size)
        elif rule == "rank":
            basis = descending_eigh(retained.matrix)[1]
            ranks = (min(int(size or 0), retained.width),) * len(basis)
        elif rule == "energy":
            basis, ranks = _energy_basis(retained, energy)
        else:
            basis, ranks = _joined_bases(per_class, _ramp if rule == "released_ramp" else lambda group: energy)
        return LayerSubspace(
            basis=basis.cpu(),
            ranks=ranks,
            null_energy=_null_energy(retained.matrix, basis, ranks),
            forget_null_energy=None if forgotten is None else _null_energy(forgotten.matrix, basis, ranks),
            next_energy=_next_energy(retained.matrix, basis),
        )

    keys = list(dict.fromkeys(module_keys.values()))
    order = keys
    if together:  # the widest first, so that every process gets as many of each width
        widths = {key: moment.width for key, moment in next(iter(moments.values())).items()}
        order = sorted(keys, key=lambda key: -widths[key])
    layers = dealt(order, decompose, device, together)
    return Subspace({key: layers[key] for key in keys}, dict(module_keys))


def check_energy(energy: float) -> None:
    """Raise UNSCError unless `energy` lies in (0, 1]."""
    if not (isinstance(energy, int | float) and math.isfinite(energy) and 0 < energy <= 1):
        raise UNSCError(f"energy: {energy!r} is outside (0, 1]; 0.95 keeps 95 % of the retained energy fixed.")


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors of symmetric matrices, largest first; shapes (g, d) and (g, d, d)."""
    symmetric = (matrix + matrix.mT) / 2  # sums leave an ulp of asymmetry
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer can fail where many eigenvalues are zero (dead ReLU channels); this driver does not.
        pairs = [scipy.linalg.eigh(m.cpu().numpy(), driver="evr") for m in symmetric]
        values = torch.stack([torch.from_numpy(w) for w, _ in pairs]).to(matrix.device)
        vectors = torch.stack([torch.from_numpy(v) for _, v in pairs]).to(matrix.device)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def rank_for_energy(values: Tensor, energy: float) -> int:
    """Smallest k such that the k largest of `values` (descending, shape (d,)) hold the fraction `energy` of their sum.

    Values below rounding never count; `energy` 1 keeps all above it.
    """
    if values.numel() == 0 or values[0] <= 0:
        return 0
    floor = max(_ROUNDING**2, values.numel() * torch.finfo(torch.float64).eps)
    above_rounding = int((values > floor * values[0]).sum())
    if energy >= 1.0:
        return above_rounding
    shares = values.cumsum(0) / values.sum()
    return min(int((shares < energy).sum()) + 1, above_rounding)


def _energy_basis(moment: SecondMoment, energy: float) -> Basis:
    """Eigenvectors of a moment; kept are as many as reach `energy`."""
    values, vectors = descending_eigh(moment.matrix)
    return vectors, tuple(rank_for_energy(v, energy) for v in values)


def _joined_bases(per_class: Mapping[str, SecondMoment], energy: Callable[[str], float]) -> Basis:
    """SVD of the classes' bases side by side; with B = [S_1 .. S_K] the left vectors are those of B B^T."""

    def gram(group: str) -> Tensor:
        vectors, ranks = _energy_basis(per_class[group], energy(group))
        kept = vectors * _column_mask(ranks, vectors)
        return kept @ kept.mT

    values, basis = descending_eigh(reduce(torch.add, map(gram, per_class)))
    return basis, tuple(int((v > 1e-10 * v[0]).sum()) if v[0] > 0 else 0 for v in values)


def _ratio_basis(retained: SecondMoment, forgotten: SecondMoment | None, ratio: float | None) -> Basis:
    """Free = span of the generalised eigenvectors u with u^T F u > ratio * u^T R u, F and R per row.

    R is regularised by its rounding so that directions the retained rows never use count as free.

    Raises:
        UNSCError: no ratio, no forgotten rows, or moments too coarse to divide by.
    """
    if ratio is None or ratio <= 0 or forgotten is None:
        raise UNSCError(f"subspace_size: {ratio!r} given; rule 'ratio' needs a positive number and forgotten rows.")
    r = retained.matrix / max(retained.rows, 1)
    f = forgotten.matrix / max(forgotten.rows, 1)
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    scale = r.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(r.dtype).tiny)[:, None, None]
    chol, failed = torch.linalg.cholesky_ex((r + r.mT) / 2 + _ROUNDING**2 * scale * eye)
    if bool(failed.any()):
        raise UNSCError(
            "subspace_rule: 'ratio' divides by the smallest retained energies, which these statistics have rounded "
            "away; collect them with float64 products (dtype=torch.float64)."
        )
    half = torch.linalg.solve_triangular(chol, f, upper=False)
    whitened = torch.linalg.solve_triangular(chol, half.mT, upper=False)
    values, vectors = descending_eigh(whitened)
    directions = torch.linalg.solve_triangular(chol.mT, vectors, upper=True)
    bases, ranks = [], []
    for g in range(r.shape[0]):
        free = int((values[g] > ratio).sum())
        full, _ = torch.linalg.qr(torch.cat([directions[g, :, :free], eye], dim=1))
        bases.append(torch.cat([full[:, free:], full[:, :free]], dim=1))
        ranks.append(r.shape[-1] - free)
    return torch.stack(bases), tuple(ranks)


def _ramp(group: str) -> float:
    """Energy of a class in the authors' released code."""
    if not group.isdigit():
        raise UNSCError(f"subspace_rule: 'released_ramp' needs integer class ids, got {group!r}; use 'energy'.")
    return min(1.0, 0.97 + 0.003 * int(group))


def _column_mask(ranks: tuple[int, ...], basis: Tensor) -> Tensor:
    """1 for kept columns, shape (groups, 1, width)."""
    index = torch.arange(basis.shape[-1], device=basis.device)
    return (index[None, :] < torch.tensor(ranks, device=basis.device)[:, None])[:, None, :].to(basis.dtype)


def _null_energy(matrix: Tensor, basis: Tensor, ranks: tuple[int, ...]) -> float:
    """Share of tr(C) in the free directions."""
    free = basis * (1 - _column_mask(ranks, basis))
    total = matrix.diagonal(dim1=-2, dim2=-1).sum()
    inside = ((matrix @ free) * free).sum().clamp_min(0)
    return float(inside / total) if total > 0 else 0.0


def _next_energy(matrix: Tensor, basis: Tensor) -> float:
    """Energy of all directions but the smallest: a rule below it leaves at least one direction free."""
    energies = ((matrix @ basis) * basis).sum(-2)
    total = energies.sum(-1)
    return float((1 - energies.amin(-1) / total.clamp_min(torch.finfo(total.dtype).tiny)).max())


def full_layers(
    subspace: Subspace,
    layers: Sequence[ProtectedLayer],
    *,
    energy: float,
    size: float | None = None,
    rule: str = "energy",
) -> dict[str, str]:
    """Why layers without a free direction are frozen, by name; the options are those of `build_subspace`.

    Raises:
        UNSCError: no layer has one. The message says how far the rule is from leaving some.
    """

    def free_at(layer: LayerSubspace) -> str:
        """The largest energy, in millionths, that leaves one direction free."""
        return f"{math.floor(1e6 * layer.next_energy - 1e-9) / 1e6:g}"

    full = {layer.name: subspace[layer.name] for layer in layers if not subspace[layer.name].has_capacity}
    if len(full) < len(layers):
        return {
            name: f"no capacity left, the rule keeps all {layer.width} directions (an energy of {free_at(layer)} would "
            "free one)"
            for name, layer in full.items()
        }
    if rule != "energy":
        advice = f"lower subspace_size ({size})" if rule in ("rank", "ratio") else "use subspace_rule 'energy'"
        widest = max(layer.width for layer in subspace.layers.values())
        raise UNSCError(f"subspace_rule: {rule!r} leaves no layer any capacity (widest layer: {widest}); {advice}.")
    nearest = max(subspace.module_keys, key=lambda name: subspace[name].next_energy)
    raise UNSCError(
        f"energy: rule {rule!r} with energy {energy} leaves no layer any capacity; "
        f"{nearest!r} would be the first to have some, at an energy of {free_at(subspace[nearest])}."
    )
