"""`jaxtransfer datasets` and `jaxtransfer models`: what there is."""

import dataclasses
from pathlib import Path

from jaxtransfer import data, models


def _print_table(columns, rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = console.width if console.is_terminal else 160
    console.print(table)


@dataclasses.dataclass(frozen=True)
class Datasets:
    """List the data sets that can be loaded here: the embedded digits, and what tfds has prepared.

    Besides these, --data takes folder:PATH (images in class folders) and any name of the tfds catalogue.
    """

    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""

    def run(self) -> None:
        """Prints a table."""
        rows = []
        for entry in data.available(self.data_dir):
            splits = ", ".join(f"{name} {size:,}" for name, size in zip(entry.splits, entry.sizes, strict=True))
            shape = "×".join("?" if n is None else str(n) for n in entry.image_shape or ())
            rows.append((entry.name, splits, str(entry.classes or ""), shape, entry.note))
        _print_table(("name", "splits", "classes", "image", "note"), rows)


@dataclasses.dataclass(frozen=True)
class Models:
    """List the models of the zoo with their number of parameters."""

    classes: int = 10
    """Outputs to count the head with."""

    def run(self) -> None:
        """Prints a table."""
        rows = []
        for name, entry in models.ZOO.items():
            count = models.count_parameters(models.create(name, self.classes), entry.image)
            rows.append((name, f"{count:,}", "×".join(map(str, entry.image)), entry.summary))
        _print_table(("name", "parameters", "image", "what"), rows)
