"""How good a representation is: neighbours, a linear probe, retrieval, how it fills the sphere, and a picture."""

from jaxtransfer.representation.domains import plot_domains
from jaxtransfer.representation.embedding import Embedded, embed, embed_views, embedder
from jaxtransfer.representation.geometry import alignment, uniformity
from jaxtransfer.representation.linear_probe import linear_probe
from jaxtransfer.representation.neighbours import knn_accuracy, neighbours
from jaxtransfer.representation.picture import plot_embedding
from jaxtransfer.representation.retrieval import recall_at_k

__all__ = [
    "Embedded",
    "alignment",
    "embed",
    "embed_views",
    "embedder",
    "knn_accuracy",
    "linear_probe",
    "neighbours",
    "plot_domains",
    "plot_embedding",
    "recall_at_k",
    "uniformity",
]
