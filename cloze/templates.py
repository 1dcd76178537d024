"""Pages from Jinja2 templates, which lie as files in `templates/` beside the module that fills them.

What all pages share lies in `page/`: `page.html`, which they extend, and its style sheet.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_SHARED = Path(__file__).parent / "page"
_NO_SCRIPT = "default-src 'none'; style-src 'unsafe-inline'"


def page_style() -> str:
    """The style sheet of every page."""
    return (_SHARED / "page.css").read_text(encoding="utf-8")


def render(module_file: str, template: str, **values: object) -> str:
    """The page that `template`, beside the module whose `__file__` is given, makes of `values`.

    In HTML every value is escaped, unless the template says `| safe`. One that is used and nobody gave is an error; a
    page that extends `page.html` has its style, and runs no script unless it gives a `policy` of its own.
    """
    is_page = template.endswith(".html")
    environment = Environment(
        loader=FileSystemLoader([Path(module_file).parent / "templates", _SHARED]),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"style": page_style(), "policy": _NO_SCRIPT} if is_page else {}
    return environment.get_template(template).render({**shared, **values}) + "\n"
