"""Extras of pyproject.toml: the one that brings a missing package."""

import re

# Package as imported: extra.
_EXTRAS = {
    **dict.fromkeys(("seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "regex", "tokenizers"), "data"),
    **dict.fromkeys(("apache_beam", "pyarrow", "zstandard", "sentencepiece"), "data"),
    **dict.fromkeys(("fastwarc", "resiliparse", "py3langid", "sklearn"), "curation"),
    **dict.fromkeys(("dask", "distributed"), "dask"),
    "numba": "images",
    "lm_eval": "evaluation",
    "t5": "t5",
    **dict.fromkeys(("math_verify", "latex2sympy2_extended"), "evaluation"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client", "referencing", "llguidance"), "serve"),
    **dict.fromkeys(("jsonschema", "json5", "rouge_score", "jupyter_client", "ipykernel", "openai"), "agents"),
    "gguf": "gguf",
    **dict.fromkeys(("obstore", "boto3"), "s3"),
    **dict.fromkeys(("pytest", "hypothesis", "datasketch", "torch", "transformers"), "test"),
}


def missing_extra(error: BaseException) -> str | None:
    """One line with the command that installs the missing package of `error`; None: it is in no extra."""
    # From the message: the exceptions that gin passes on have lost their `name`.
    found = re.match(r"No module named '(\w+)", str(error)) if isinstance(error, ModuleNotFoundError) else None
    package = found[1] if found else ""
    if package not in _EXTRAS:
        return None
    return (
        f"{package} is not installed: in the repository, `pip install -c requirements.txt -e '.[{_EXTRAS[package]}]'` "
        f"brings it"
    )
