"""Fusion of weights: several networks of one architecture into one; trees in, a tree out, leaf by leaf.

    soup = jt.fusion.average([run.variables for run in runs])
    merged = jt.fusion.ties(base, [digits, letters], density=0.2)
    merged = jt.fusion.renewed(model, merged, batches)  # nets with batch norm: statistics that belong to these weights

Trees are parameters, or variables `{"params": ..., "batch_stats": ...}`. Of variables the parameters are fused; running
state becomes its mean, until it is renewed: the plain one, or where models are mixed by weights that one. Leaves that
are no floating-point numbers stay those of the base, or of the first model. A leaf is computed in at least float32,
summed in float64, and comes back in its own type. Another architecture is one error, which names the first path that
differs; a weight that is NaN or infinite is one, too. `match_heads` brings class heads into one order.

Networks of any architectures are fused by what they say: `jt.models.ensemble`, `added`, `stacked` and `gated` make one
model of them, which `jt.distillation` brings into a single net.

The weights of one run are averaged while it trains: `jt.ema`, `jt.averaged` (stochastic weight averaging with the decay
`jt.schedules.weight_averaging`), `jt.optim.lookahead`; or `average` takes its checkpoints.
"""

from jaxtransfer.fusion import permutations
from jaxtransfer.fusion.ada_merging import Merger, ada_merging, merger
from jaxtransfer.fusion.averages import average, slerp, wise_ft
from jaxtransfer.fusion.breadcrumbs import breadcrumbs
from jaxtransfer.fusion.consensus import (
    disjoint_mean,
    weighted_disjoint_mean,
    weighted_disjoint_sum,
    weighted_mean,
    weighted_sum,
)
from jaxtransfer.fusion.dropping import by_norm, by_probability, dare, della, unscaled
from jaxtransfer.fusion.fisher import fisher
from jaxtransfer.fusion.gram_matrices import gram_matrices
from jaxtransfer.fusion.heads import match_heads
from jaxtransfer.fusion.knots import knots
from jaxtransfer.fusion.leaves import check_alike
from jaxtransfer.fusion.model_stock import model_stock
from jaxtransfer.fusion.permutations import permutation_sizes, permuted
from jaxtransfer.fusion.rebasin import rebasin, weight_matching
from jaxtransfer.fusion.regmean import gram, regmean
from jaxtransfer.fusion.soups import Soup, greedy_soup
from jaxtransfer.fusion.specifications import specification
from jaxtransfer.fusion.statistics import renewed
from jaxtransfer.fusion.task_vectors import apply_task_vector, task_arithmetic, task_vector
from jaxtransfer.fusion.ties import agreeing, ties, trim

__all__ = [
    "Merger",
    "Soup",
    "ada_merging",
    "agreeing",
    "apply_task_vector",
    "average",
    "breadcrumbs",
    "by_norm",
    "by_probability",
    "check_alike",
    "dare",
    "della",
    "disjoint_mean",
    "fisher",
    "gram",
    "gram_matrices",
    "greedy_soup",
    "knots",
    "match_heads",
    "merger",
    "model_stock",
    "permutation_sizes",
    "permutations",
    "permuted",
    "rebasin",
    "regmean",
    "renewed",
    "slerp",
    "specification",
    "task_arithmetic",
    "task_vector",
    "ties",
    "trim",
    "unscaled",
    "weight_matching",
    "weighted_disjoint_mean",
    "weighted_disjoint_sum",
    "weighted_mean",
    "weighted_sum",
    "wise_ft",
]
