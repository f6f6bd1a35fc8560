"""Puts the report together: Markdown, one HTML page that needs nothing else, pictures and the files of DVC's
plots.

Equal results give equal bytes: nothing here knows the date or the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipelines.report_html import charts, facts, names
from pipelines.report_html.ablation_tables import ablations
from pipelines.report_html.claims import Finding, findings
from pipelines.report_html.data import Results
from pipelines.report_html.formats import as_csv, as_latex
from pipelines.report_html.headline import Headline, headline
from pipelines.report_html.leaderboard import leaderboard
from pipelines.report_html.measures import measures_tables
from pipelines.report_html.paper_tables import paper_tables
from pipelines.report_html.rerun import rerun
from pipelines.report_html.scenes import Gallery, gallery
from pipelines.report_html.tables import Table, coverage_table, main_table

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """What the page says about one VLM. None is left out with a sentence that says why."""

    vlm: str
    headline: Headline
    table: Table
    leaderboard: Table | None
    ablations: list[Table]
    findings: list[Finding]
    coverage: Table | None
    measures: list[Table]
    accuracy: bytes | None
    gallery: Gallery | None
    efficiency: Table | None
    paper: list[Table]


def render(results: Results) -> dict[str, bytes]:
    """All files of the report: path below `reports/` -> content."""
    sections = [_section(results, vlm) for vlm in results.vlms]
    beside = facts.figure3_table(results)
    out = {**documents(results, sections), **_figures(results, sections)}
    out["plots/accuracy_vs_tokens.csv"] = charts.accuracy_csv(results)
    out["plots/training_curves.csv"] = charts.curves_csv(results.pruners)
    out |= table_files([table for section in sections for table in section.paper])
    out |= table_files([] if beside is None else [beside])
    return dict(sorted(out.items()))


def documents(results: Results, sections: list[Section] | None = None) -> dict[str, bytes]:
    """The two documents: HTML with everything in it, and Markdown that points to `figures/`."""
    context: dict[str, Any] = {
        "sections": [_section(results, vlm) for vlm in results.vlms] if sections is None else sections,
        "curves": charts.curves_svg(results.pruners),
        "pruners": facts.pruners_table(results),
        "paper": facts.paper_table(results),
        "paper_vlms": (results.paper or {}).get("vlms", {}),
        "times": facts.figure3_table(results),
        "bars": facts.figure3(results),
        "rerun": rerun(results),
        "provenance": facts.provenance(results),
        "names": names,
    }
    templates = _templates()
    return {name: templates.get_template(f"{name}.j2").render(context).encode() for name in ("index.html", "report.md")}


def table_files(tables: Sequence[Table]) -> dict[str, bytes]:
    """Each table as CSV and as LaTeX."""
    kinds = {"csv": as_csv, "tex": as_latex}
    return {f"tables/{table.name}.{kind}": write(table) for table in tables for kind, write in kinds.items()}


def _section(results: Results, vlm: str) -> Section:
    return Section(
        vlm=vlm,
        headline=headline(results, vlm),
        table=main_table(results, vlm),
        leaderboard=leaderboard(results, vlm),
        ablations=ablations(results, vlm),
        findings=findings(results, vlm),
        coverage=coverage_table(results, vlm),
        measures=measures_tables(results, vlm),
        accuracy=charts.accuracy_svg(results, vlm),
        gallery=gallery(results, vlm),
        efficiency=facts.efficiency_table(results, vlm),
        paper=paper_tables(results, vlm),
    )


def _figures(results: Results, sections: list[Section]) -> dict[str, bytes]:
    """Pictures for the Markdown report, which has none inside."""
    out: dict[str, bytes] = {}
    for section in sections:
        picture = charts.accuracy_svg(results, section.vlm, "png")
        if picture is not None:
            out[f"figures/{section.vlm}-accuracy.png"] = picture
        if section.gallery is not None:
            for title, _ in section.gallery.budgets:
                out[f"figures/{section.vlm}-kept-{slug(title)}.png"] = section.gallery.png(title)
    more = {"training": charts.curves_svg(results.pruners, "png"), "figure3": facts.figure3(results, "png")}
    out |= {f"figures/{name}.png": picture for name, picture in more.items() if picture is not None}
    return out


def slug(title: str) -> str:
    """A budget as part of a file's name: `48 Tokens (33.3%)` -> `48`, `33.3% Tokens` -> `33.3pct`."""
    return title.split(" ")[0].replace("%", "pct")


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(("html", "html.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(inline=charts.inline, slug=slug, cell=_markdown_cell)
    return environment


def _markdown_cell(text: str) -> str:
    """Text that cannot break out of a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
