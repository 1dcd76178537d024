"""HTML pages from Jinja2 templates, which lie as files in `templates/` beside the module that fills them."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(module_file: str, template: str, **values: object) -> str:
    """The page that `template`, beside the module whose `__file__` is given, makes of `values`.

    Every value is escaped, unless the template says `| safe`; one that the template uses and nobody gave is an error.
    """
    loader = FileSystemLoader(Path(module_file).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values) + "\n"
