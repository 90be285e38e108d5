"""Moved to `jaxtransfer.runs.report`; the old name keeps working."""

from jaxtransfer.runs.report import evaluation, plot_curves, print_table, save_figure, table, write_report

__all__ = ["evaluation", "plot_curves", "print_table", "save_figure", "table", "write_report"]
