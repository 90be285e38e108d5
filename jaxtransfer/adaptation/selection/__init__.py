"""Model selection without target labels: scores of a trained model by what it says of unlabelled data.

Each is a function of arrays, the larger the better; `watched` makes of them what `jt.fit(measure=, monitor=)` takes.

    scores = jt.adaptation.selection
    scores.information_maximization(target_logits)
    scores.dev(source_logits, source_labels, source_features, target_features)
"""

from jaxtransfer.adaptation.selection.confidence import bnm, entropy, information_maximization, softmax_correlation
from jaxtransfer.adaptation.selection.density import snd
from jaxtransfer.adaptation.selection.distance import a_distance, proxy_a_distance
from jaxtransfer.adaptation.selection.reverse import reverse_validation
from jaxtransfer.adaptation.selection.source_risk import dev, dev_risk, source_accuracy
from jaxtransfer.adaptation.selection.watching import Seen, scored, seen_by, watched

__all__ = [
    "Seen",
    "a_distance",
    "bnm",
    "dev",
    "dev_risk",
    "entropy",
    "information_maximization",
    "proxy_a_distance",
    "reverse_validation",
    "scored",
    "seen_by",
    "snd",
    "softmax_correlation",
    "source_accuracy",
    "watched",
]
