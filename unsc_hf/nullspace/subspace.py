"""Which directions the retained rows span, by rule, and what is left free: pure linear algebra on second moments."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from ..errors import UNSCError
from ..utils.distributed import dealt
from ..utils.sizes import format_size
from .memory import scratch_bytes, whole_bytes
from .moments import Moment, SecondMoment, total_moment
from .sketch import MomentSketch, RowSample

logger = logging.getLogger(__name__)


RULES = ("energy", "rank", "ratio", "released_ramp")


MERGES = ("sum", "concat")


# Rounding of float32 activations: singular values below this share of the largest are noise of the forward pass itself.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class LayerSubspace:
    """Retained subspace and null space of one layer input.

    Attributes:
        basis: orthonormal eigenvectors of the retained moment, float64, shape (groups, width, width), descending; for
            group g the first `ranks[g]` columns span what is kept, the others are free. Of a sketched layer the kept columns
            alone, shape (1, width, rank): what is orthogonal to them is free.
        ranks: columns kept, one number per group.
        null_energy: share of the retained energy that lies in the null space (0 at energy 1.0, up to rounding); of a sketched
            layer at most this share does.
        forget_null_energy: share of the forgotten rows' energy that lies in the null space, or None if unknown; of a sketched
            layer at least this share does.
        next_energy: energy at which one direction would become free, when there is no capacity.
        sketch_size: columns of the sketch, None where the whole moment is known.
        error_bound: share of the retained energy that the sketch may have missed, None where nothing was.
    """

    basis: Tensor
    ranks: tuple[int, ...]
    null_energy: float
    forget_null_energy: float | None
    next_energy: float
    sketch_size: int | None = None
    error_bound: float | None = None

    @property
    def width(self) -> int:
        return self.basis.shape[-2]

    @property
    def thin(self) -> bool:
        """Whether the basis holds the kept directions alone."""
        return self.basis.shape[-1] < self.width

    @property
    def rank(self) -> float:
        """Mean rank over groups (an integer but for grouped convolutions)."""
        return sum(self.ranks) / len(self.ranks)

    @property
    def capacity(self) -> float:
        """Mean number of free directions over groups."""
        return self.width - self.rank

    @property
    def has_capacity(self) -> bool:
        return any(rank < self.width for rank in self.ranks)


@dataclass(frozen=True)
class LayerReport:
    """One row of the report: layer, its key, width, rank, capacity, and energies in the null space (shares).

    Of a sketched layer at most `retain_null_energy` and at least `forget_null_energy` lie there; `sketch_size` and `error_bound` are
    those of `LayerSubspace`.
    """

    layer: str
    width: int
    rank: float
    capacity: float
    retain_null_energy: float
    forget_null_energy: float | None
    sketch_size: int | None = None
    error_bound: float | None = None


@dataclass(frozen=True)
class Subspace:
    """Subspaces of all layers: `layers[key]`, with `module_keys` from module name to key."""

    layers: dict[str, LayerSubspace]
    module_keys: dict[str, str]
    rule: str

    def __getitem__(self, module_name: str) -> LayerSubspace:
        return self.layers[self.module_keys[module_name]]

    def without_bases(self) -> Subspace:
        """The same ranks and energies, without the matrices: what is left to report when projectors have been made."""
        layers = {key: replace(layer, basis=layer.basis[..., :0].clone()) for key, layer in self.layers.items()}
        return Subspace(layers, self.module_keys, self.rule)

    def report(self) -> list[LayerReport]:
        """Rank, capacity and forgotten energy in the null space, for each module."""
        return [
            LayerReport(
                name,
                self[name].width,
                self[name].rank,
                self[name].capacity,
                self[name].null_energy,
                self[name].forget_null_energy,
                self[name].sketch_size,
                self[name].error_bound,
            )
            for name in self.module_keys
        ]

    def to_dict(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.report()]

    def __str__(self) -> str:
        lines = [
            f"{'layer':<48} {'width':>6} {'rank':>7} {'free':>7} {'retained energy free':>21} {'forgotten energy free':>22}"
        ]
        for row in self.report():
            forgotten = "" if row.forget_null_energy is None else f"{row.forget_null_energy:.4f}"
            lines.append(
                f"{row.layer:<48} {row.width:>6} {row.rank:>7.4g} {row.capacity:>7.4g} "
                f"{row.retain_null_energy:>21.2e} {forgotten:>22}"
                + (
                    ""
                    if row.error_bound is None
                    else f"  sketch of {row.sketch_size}, error bound {row.error_bound:.2e}"
                )
            )
        return "\n".join(lines)


def build_subspace(
    moments: Mapping[str, Mapping[str, Moment]],
    module_keys: Mapping[str, str],
    *,
    rule: str = "energy",
    energy: float = 0.95,
    rank: int | None = None,
    ratio: float | None = None,
    merge: str = "sum",
    forget: Mapping[str, Moment] | None = None,
    device: torch.device | str | None = None,
    together: bool = False,
) -> Subspace:
    """Subspace of the retained rows for every layer input.

    Of a layer whose moment C is sketched, the approximation C^ is decomposed. Nowhere does it exceed C, so rule "energy" keeps the
    smallest k whose directions hold the fraction `energy` of the *whole* trace for certain; where the sketch does not reach it, all
    its directions are kept, and a warning says which energy they hold and what would do. "rank" keeps the largest directions of
    C^; the other rules, and merging by "concat", need whole moments.

    Args:
        moments: `moments[class][key]` of the *retained* classes.
        module_keys: key by module name.
        rule: how many directions are kept.
            "energy": the smallest k whose squared singular values reach the fraction `energy` (paper, section 4.1);
            1.0 means everything above the rounding of float32 activations, relative to the largest.
            "rank": the `rank` largest directions.
            "ratio": free are the directions in which a forgotten row carries more than `ratio` times the energy of a
            retained row (generalised eigenvectors of the two moments); needs `forget`.
            "released_ramp": the authors' released code, energy 0.97 + 0.003 * class id for each class (capped at 1),
            bases concatenated; class names must be ids.
        merge: "sum" adds the classes' moments, which is exact. "concat" follows the paper: a basis for each class, all
            concatenated, and an SVD whose left singular vectors above rounding are kept.
        forget: moments of the forgotten rows by key, for rule "ratio" and for the report.
        device: where to decompose, in float64, layer after layer; None leaves the moments where they are. The result is on the CPU.
        together: the processes, all of which call this, take the layers in turn; every one gets the same bits of all.

    Raises:
        UNSCError: for an unknown rule, a value out of range, or a rule that a sketched layer cannot follow.
    """
    if rule not in RULES:
        raise UNSCError(f"subspace_rule: {rule!r} does not exist; choose from {', '.join(RULES)}.")
    if merge not in MERGES:
        raise UNSCError(f"subspace_merge: {merge!r} does not exist; choose from {', '.join(MERGES)}.")
    check_energy(energy)
    if rule == "rank" and (rank is None or rank < 0):
        raise UNSCError(f"subspace_rank: {rank!r} given; rule 'rank' needs a number of directions, 0 or more.")
    if rule == "ratio" and (ratio is None or ratio <= 0 or forget is None):
        raise UNSCError(f"subspace_ratio: {ratio!r} given; rule 'ratio' needs a positive number and forgotten rows.")

    def decompose(key: str) -> LayerSubspace:
        found = {group: by_key[key] for group, by_key in moments.items()}
        theirs = None if forget is None else forget[key]
        place = next(iter(found.values())).device if device is None else torch.device(device)
        if all(isinstance(moment, MomentSketch) for moment in found.values()):
            if rule not in ("energy", "rank") or merge == "concat":
                option = "subspace_rule" if rule not in ("energy", "rank") else "subspace_merge"
                raise UNSCError(
                    f"{option}: {rule if option == 'subspace_rule' else merge!r} needs the whole moment of {key!r}, of which there is a "
                    "sketch only; use rule 'energy' or 'rank' with merge 'sum', or raise max_statistics_memory."
                )
            total = total_moment(moment for moment in found.values() if isinstance(moment, MomentSketch))
            return _sketched_layer(key, total.to(place), theirs, energy, rank if rule == "rank" else None)
        per_class = {group: whole_moment(moment, key).to(place) for group, moment in found.items()}
        retained = total_moment(per_class.values())
        if rule == "ratio":
            assert ratio is not None
            assert theirs is not None
            basis, ranks = _ratio_basis(retained, whole_moment(theirs, key).to(place), ratio)
        elif rule == "released_ramp":
            basis, ranks = _concatenated_basis(
                per_class, {g: min(1.0, 0.97 + 0.003 * _class_id(g)) for g in per_class}, None
            )
        elif merge == "concat":
            basis, ranks = _concatenated_basis(
                per_class, dict.fromkeys(per_class, energy), rank if rule == "rank" else None
            )
        else:
            basis, ranks = _moment_basis(retained, energy, rank if rule == "rank" else None)
        return LayerSubspace(
            basis.cpu(),
            ranks,
            _null_energy(retained.matrix, basis, ranks),
            None if theirs is None else _forgotten_share(theirs.to(place), basis, ranks),
            _next_energy(retained.matrix, basis),
        )

    keys = list(dict.fromkeys(module_keys.values()))
    if together:  # the widest first, so that every process gets as many of each width
        first = {key: next(iter(moments.values()))[key] for key in keys}
        layers = dealt(sorted(keys, key=lambda key: -first[key].width), decompose, device)
        layers = {key: layers[key] for key in keys}
    else:
        layers = {key: decompose(key) for key in keys}
    return Subspace(layers, dict(module_keys), rule)


def whole_moment(moment: Moment, key: str) -> SecondMoment:
    """The moment, if it is there in full.

    Raises:
        UNSCError: a sketch or a sample of rows.
    """
    if isinstance(moment, SecondMoment):
        return moment
    kind = "a sample of rows" if isinstance(moment, RowSample) else "a sketch"
    raise UNSCError(
        f"statistics: of {key!r} there is {kind}, not the whole moment; collect it with more max_statistics_memory."
    )


def randomised(subspace: Subspace, seed: int) -> Subspace:
    """Control: random subspaces of the same ranks (Haar measure). Energies are those of a random direction."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for key, layer in subspace.layers.items():
        basis, _ = torch.linalg.qr(torch.randn(layer.basis.shape, generator=generator, dtype=layer.basis.dtype))
        share = layer.capacity / layer.width
        layers[key] = replace(layer, basis=basis, null_energy=share, forget_null_energy=share, error_bound=None)
    return Subspace(layers, subspace.module_keys, subspace.rule)


def no_capacity_reason(layer: LayerSubspace) -> str:
    """Why a layer is frozen."""
    return (
        f"no capacity left, the rule keeps all {layer.width} directions (an energy of {_free_at(layer)} would free one)"
    )


def no_capacity_message(subspace: Subspace, energy: float, rank: int | None, ratio: float | None, merge: str) -> str:
    """Why no layer has capacity under these options, and how far the rule is from leaving some."""
    advice = {
        "rank": f"lower subspace_rank ({rank})",
        "ratio": f"lower subspace_ratio ({ratio})",
        "released_ramp": "use subspace_rule 'energy'",
    }
    if subspace.rule in advice or merge == "concat":
        wanted = advice.get(subspace.rule, "lower energy, or merge by 'sum'")
        widest = max(layer.width for layer in subspace.layers.values())
        return f"subspace_rule: {subspace.rule!r} leaves no layer any capacity (widest layer: {widest}); {wanted}."
    nearest = max(subspace.module_keys, key=lambda name: subspace[name].next_energy)
    return (
        f"energy: rule {subspace.rule!r} with energy {energy} leaves no layer any capacity; "
        f"{nearest!r} would be the first to have some, at an energy of {_free_at(subspace[nearest])}."
    )


def _free_at(layer: LayerSubspace) -> str:
    """The largest energy, in millionths, that leaves one direction of a full layer free."""
    return f"{math.floor(1e6 * layer.next_energy - 1e-9) / 1e6:g}"


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
        # Divide and conquer can fail where many eigenvalues are exactly zero (dead ReLU channels); this driver does not.
        pairs = [scipy.linalg.eigh(m.cpu().numpy(), driver="evr") for m in symmetric]
        values = torch.stack([torch.from_numpy(w) for w, _ in pairs]).to(matrix.device)
        vectors = torch.stack([torch.from_numpy(v) for _, v in pairs]).to(matrix.device)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def rank_for_energy(values: Tensor, energy: float, total: float | None = None) -> int:
    """Smallest k such that the k largest of `values` (descending, shape (d,)) hold the fraction `energy` of `total` (of their sum
    when None); as many as are above rounding where they do not."""
    if values.numel() == 0 or values[0] <= 0:
        return 0
    floor = max(_ROUNDING**2, values.numel() * torch.finfo(torch.float64).eps)
    above_rounding = int((values > floor * values[0]).sum())
    if energy >= 1.0:
        return above_rounding
    shares = values.cumsum(0) / (values.sum() if total is None else total)
    return min(int((shares < energy).sum()) + 1, above_rounding)


def _sketched_layer(
    key: str, sketch: MomentSketch, forgotten: Moment | None, energy: float, rank: int | None
) -> LayerSubspace:
    """Kept directions of a sketched layer, and what they hold for certain."""
    values, vectors = sketch.eigen()
    total = float(sketch.trace)
    kept = rank_for_energy(values, 1.0 if rank is not None else energy, total)
    kept = kept if rank is None else min(rank, kept)
    held = float(values[:kept].sum()) / total if total > 0 else 1.0
    everything = 1.0 - sketch.width * _ROUNDING**2  # a share below rounding may be missing in each direction
    wanted = min(energy, everything) if rank is None else everything if kept < rank else 0.0
    if total > 0 and held < wanted:
        asked = f"energy {energy:g} was" if rank is None else f"subspace_rank {rank} was"
        logger.warning(
            "%s: %s asked for, its sketch of %d columns gives %d directions with an energy of %.6g for certain; %s.",
            key, asked, sketch.size, kept, held, _what_would_do(values, sketch, wanted, rank),
        )  # fmt: skip
    basis = vectors[None, :, :kept]
    return LayerSubspace(
        basis.cpu().contiguous(),
        (kept,),
        max(0.0, 1.0 - held),
        None if forgotten is None else _forgotten_share(forgotten.to(basis.device), basis, (kept,)),
        1.0,
        sketch.size,
        max(0.0, 1.0 - float(values.sum()) / total) if total > 0 else 0.0,
    )


def _what_would_do(values: Tensor, sketch: MomentSketch, wanted: float, rank: int | None) -> str:
    """Advice where a sketch is too small: twice the directions that are needed, as far as the spectrum can be guessed.

    The first half of a sketch's eigenvalues is nearly right, and so is then the energy of all others; they are taken to fall on by
    the power by which that half's second half falls.
    """
    least = whole_bytes(1, sketch.width) + scratch_bytes(1, sketch.width, torch.float32)
    all_of_it = f"max_statistics_memory of {format_size(least)} keeps the whole moment"
    half, needed = len(values) // 2, 2 * rank if rank is not None else sketch.width
    seen = values[half // 2 : half].cpu()
    if rank is None and len(seen) > 1 and bool((seen > 0).all()):
        place, height = torch.arange(half // 2 + 1, half + 1, dtype=seen.dtype).log(), seen.log()
        place, height = place - place.mean(), height - height.mean()
        fall = float((place * height).sum() / place.square().sum())
        tail = torch.arange(half + 1, sketch.width + 1, dtype=seen.dtype) ** fall
        head, total = float(values[:half].sum()), float(sketch.trace)
        held = (head + (total - head) * tail.cumsum(0) / tail.sum()) / total
        needed = 2 * (half + int((held < wanted).sum()) + 1)
    if needed > sketch.width // 2:
        return all_of_it
    return f"a sketch_size of about {needed} should do ({format_size(8 * needed * sketch.width)}), and {all_of_it}"


def _forgotten_share(moment: Moment, basis: Tensor, ranks: tuple[int, ...]) -> float:
    """Share of tr(F) outside the kept columns of `basis`; of a sketch F^, the share that lies there for certain."""
    if isinstance(moment, SecondMoment) and basis.shape[-1] == basis.shape[-2]:
        return _null_energy(moment.matrix, basis, ranks)
    kept = basis[0, :, : ranks[0]]
    if isinstance(moment, SecondMoment):
        total = float(moment.matrix.diagonal(dim1=-2, dim2=-1).sum())
        outside = total - float(((moment.matrix[0] @ kept) * kept).sum())
    elif isinstance(moment, MomentSketch):
        factor, _ = moment.factor()
        total = float(moment.trace)
        outside = float(factor.square().sum() - (kept.mT @ factor).square().sum())
    else:
        raise UNSCError(
            "statistics: a sample of rows has no energies by direction; collect the forgotten rows' moments."
        )
    return max(0.0, outside) / total if total > 0 else 0.0


def _moment_basis(moment: SecondMoment, energy: float, rank: int | None) -> tuple[Tensor, tuple[int, ...]]:
    values, vectors = descending_eigh(moment.matrix)
    if rank is not None:
        return vectors, (min(rank, values.shape[-1]),) * values.shape[0]
    return vectors, tuple(rank_for_energy(v, energy) for v in values)


def _concatenated_basis(
    per_class: Mapping[str, SecondMoment], energies: Mapping[str, float], rank: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """SVD of the classes' bases side by side; with B = [S_1 .. S_K] the left vectors are those of B B^T."""
    gram: Tensor | None = None
    for group, moment in per_class.items():
        vectors, ranks = _moment_basis(moment, energies[group], rank)
        kept = vectors * _column_mask(ranks, vectors)
        gram = kept @ kept.mT if gram is None else gram + kept @ kept.mT
    assert gram is not None
    values, basis = descending_eigh(gram)
    if rank is not None:
        return basis, (min(rank, values.shape[-1]),) * values.shape[0]
    return basis, tuple(int((v > 1e-10 * v[0]).sum()) if v[0] > 0 else 0 for v in values)


def _ratio_basis(retained: SecondMoment, forgotten: SecondMoment, ratio: float) -> tuple[Tensor, tuple[int, ...]]:
    """Free = span of the generalised eigenvectors u with u^T F u > ratio * u^T R u, F and R per row.

    R is regularised by its rounding so that directions the retained rows never use count as free.
    """
    r = retained.matrix / max(retained.rows, 1)
    f = forgotten.matrix / max(forgotten.rows, 1)
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    scale = r.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(r.dtype).tiny)[:, None, None]
    chol, failed = torch.linalg.cholesky_ex((r + r.mT) / 2 + _ROUNDING**2 * scale * eye)
    if bool(failed.any()):
        raise UNSCError(
            "subspace_rule: 'ratio' divides by the smallest retained energies, which these statistics have rounded away; collect them "
            "with float64 products (statistics_dtype='float64')."
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


def _class_id(group: str) -> int:
    if not group.isdigit():
        raise UNSCError(f"subspace_rule: 'released_ramp' needs integer class ids, got {group!r}; use 'energy'.")
    return int(group)


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
