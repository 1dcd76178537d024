"""Pages from Jinja2 templates, which lie as files in `templates/` beside the module that fills them."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(module_file: str, template: str, **values: object) -> str:
    """The page that `template`, beside the module whose `__file__` is given, makes of `values`.

    In HTML every value is escaped, unless the template says `| safe`. One that is used and nobody gave is an error.
    """
    loader = FileSystemLoader(Path(module_file).parent / "templates")
    environment = Environment(
        loader=loader,
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values) + "\n"
