"""`fptq-export triton --router`: a model that divides requests among text models of the same repository."""

from __future__ import annotations

from fptq_export.errors import Problem, UserErrors
from fptq_export.triton.models import MODEL_FILE, Models, model_file
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.protobuf import config_from_text, data_type
from fptq_export.triton.repository import CONFIG_FILE, ModelVersion, next_version
from fptq_export.triton.router_options import RouterOptions
from fptq_export.triton.serving.routing import ROUTE, ROUTES_FILE
from fptq_export.triton.text_config import INPUTS, text_config
from fptq_export.triton.text_models import NEEDS_PACKAGE

__all__ = ["router_models"]


def router_models(options: RouterOptions) -> Models:
    """The router, after a look at what it routes to.

    Raises:
        UserErrors: Each model that is not in the repository, or takes no text.
    """
    routes = options.routes()
    names = [route.model for route in routes.routes] + ([routes.shadow] if routes.shadow else [])
    problems = [problem for name in dict.fromkeys(names) for problem in _problems(options, name)]
    if problems:
        raise UserErrors("options", problems, "write the models first: fptq-export triton DIR --repository REPO")
    version = ModelVersion(
        name=options.router,
        config=_config(options),
        version=next_version([options.repository / options.router], options.version),
        copies={},
        texts={
            MODEL_FILE: model_file("fptq_export.triton.serving.router_model"),
            ROUTES_FILE: routes.model_dump_json(indent=2) + "\n",
        },
    )
    return Models((version,), needs=(NEEDS_PACKAGE,))


def _config(options: RouterOptions) -> object:
    shared = TritonOptions(
        source=options.repository,
        repository=options.repository,
        variant="cpu",
        keep_versions=options.keep_versions,
        max_active=options.max_active,
        max_queue=options.max_queue,
    )
    config = text_config(options.router, shared)
    config.input.add(name=ROUTE, data_type=data_type("STRING"), dims=[1], optional=True)
    return config


def _problems(options: RouterOptions, name: str) -> list[Problem]:
    path = options.repository / name / CONFIG_FILE
    if name == options.router:
        return [Problem("--route", f"{name} is the router itself")]
    if not path.is_file():
        return [Problem("--route", f"{options.repository} has no model {name}")]
    config = config_from_text(path.read_text(encoding="utf-8"), str(path))
    if not {item.name for item in config.input} >= set(INPUTS):
        return [Problem("--route", f"{name} is no text model")]
    return []
