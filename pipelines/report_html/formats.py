"""Tables as files for other programs: CSV, and LaTeX with booktabs."""

import csv
import io

from pipelines.report_html import names
from pipelines.report_html.tables import Cell, Table

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "’": "'", "–": "--", "×": r"$\times$",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def as_csv(table: Table) -> bytes:
    """Columns `block`, the table's own, each with a second one for the line below it; what is missing is empty."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    head = [part for name in table.head[1:] for part in (name, f"{name}, below")]
    writer.writerow(["block", table.head[0], *head])
    for block in table.blocks:
        for line in block.lines:
            cells = [text for cell in line.cells for text in (_csv(cell.top), cell.bottom)]
            writer.writerow([block.title, line.label, *cells])
    return out.getvalue().encode()


def as_latex(table: Table) -> bytes:
    """A `table` environment that needs the package booktabs alone."""
    columns = len(table.head)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{l{'c' * (columns - 1)}}}", r"\toprule"]
    lines.append(" & ".join(map(latex, table.head)) + r" \\")
    for block in table.blocks:
        lines.append(r"\midrule")
        if block.title:
            lines.append(rf"\multicolumn{{{columns}}}{{c}}{{\textit{{{latex(block.title)}}}}} \\")
        for line in block.lines:
            lines.append(" & ".join([latex(line.label), *map(_cell, line.cells)]) + r" \\")
            if any(cell.bottom for cell in line.cells):
                below = [rf"{{\scriptsize {latex(cell.bottom)}}}" if cell.bottom else "" for cell in line.cells]
                lines.append(" & ".join(["", *below]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.note:
        lines.append(rf"\par\smallskip\footnotesize {latex(table.note)}")
    lines.append(r"\end{table}")
    return ("\n".join(lines) + "\n").encode()


def latex(text: str) -> str:
    """Text that means itself in LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _cell(cell: Cell) -> str:
    return rf"\textbf{{{latex(cell.top)}}}" if cell.bold else latex(cell.top)


def _csv(text: str) -> str:
    return "" if text == names.DASH else text
