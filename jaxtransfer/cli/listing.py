"""`jaxtransfer datasets` and `jaxtransfer models`: what there is."""

import dataclasses

from jaxtransfer import data, models
from jaxtransfer.cli.options import DataDir, at_least, check_folder


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
    """List the data sets that can be loaded here.

    The embedded digits and what tfds has prepared; --data takes folder:PATH too.
    """

    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""

    def run(self) -> None:
        """Prints a table."""
        check_folder(self.data_dir)
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
        at_least(self, 1, "classes")
        rows = []
        for name, entry in models.ZOO.items():
            count = models.count_parameters(models.create(name, self.classes), entry.image, entry.dtype)
            shape = "×".join(map(str, entry.image)) + " tokens" * entry.takes_text
            rows.append((name, f"{count:,}", shape, entry.summary))
        _print_table(("name", "parameters", "image", "what"), rows)
