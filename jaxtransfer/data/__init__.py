"""Data: named data sets, deterministic pipelines, exact evaluation batches, caches of a teacher's outputs."""

from jaxtransfer.data import augment, views
from jaxtransfer.data.class_weights import balanced_weights
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.entries import Entry
from jaxtransfer.data.episodes import RIGHT_ANGLES, EpisodeBatches, Episodes, split_classes
from jaxtransfer.data.evaluation import eval_batches
from jaxtransfer.data.fingerprint import fingerprint
from jaxtransfer.data.folder import several_sizes
from jaxtransfer.data.frames import from_frame
from jaxtransfer.data.hold_out import hold_out, share_examples
from jaxtransfer.data.joined import joined
from jaxtransfer.data.known_labels import known_labels
from jaxtransfer.data.load import load
from jaxtransfer.data.pipeline import Pipeline, pipeline
from jaxtransfer.data.prefetch import prefetch_to_device
from jaxtransfer.data.statistics import statistics
from jaxtransfer.data.teacher_cache import TeacherCache, attach_outputs, open_outputs, outputs_note
from jaxtransfer.data.teacher_writer import write_outputs
from jaxtransfer.data.temperature import temperature_weights
from jaxtransfer.data.zipped import Zipped, zipped
from jaxtransfer.resizing import Resizing
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import Vocabulary

__all__ = [
    "RIGHT_ANGLES",
    "Dataset",
    "Entry",
    "EpisodeBatches",
    "Episodes",
    "Pipeline",
    "Resizing",
    "TeacherCache",
    "Tokenizer",
    "Vocabulary",
    "Zipped",
    "attach_outputs",
    "augment",
    "available",
    "balanced_weights",
    "eval_batches",
    "fingerprint",
    "from_frame",
    "hold_out",
    "joined",
    "known_labels",
    "load",
    "open_outputs",
    "outputs_note",
    "pipeline",
    "prefetch_to_device",
    "several_sizes",
    "share_examples",
    "split_classes",
    "statistics",
    "temperature_weights",
    "views",
    "write_outputs",
    "zipped",
]


def available(data_dir=None):
    """Lists the embedded digits and the prepared tfds data sets.

    Args:
      data_dir: the tfds folder; by default `$TFDS_DATA_DIR`, else tfds' own. Our cache is listed too.

    Returns:
      One entry per data set with name, splits, sizes, classes, image_shape, prepared and note; one that can't
      be read says so in its note.
    """
    from jaxtransfer.data.catalogue import available  # tfds is imported when it is needed

    return available(data_dir)
