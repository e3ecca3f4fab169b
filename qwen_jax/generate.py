"""Continues prompts with a trained or converted model: one prompt on the screen, or a file of prompts.

python -m qwen_jax.generate --checkpoint runs/tiny --prompt "def main("
python -m qwen_jax.generate --checkpoint runs/tiny --prompts prompts.jsonl > continuations.jsonl
python -m qwen_jax.generate --checkpoint runs/vl --image a.png --prompt "Generate the caption in English:"
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_jax import files
from qwen_jax.command_line import add_mesh, path_argument, quick_imports, run
from qwen_jax.data import content
from qwen_jax.data.content import Content, Unusable
from qwen_jax.data.conversations import read_parts

with quick_imports():
    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.conversion import check_rows, load_for_decoding, load_pretrained, load_tokenizer, read_model_config
    from qwen_jax.inference import Engine, Request, Result, SamplingConfig
    from qwen_jax.inference.constraints import Constraint
    from qwen_jax.pictures import Loaded, check_files, draw_reply, load_content, picture_paths, prompt_with
    from qwen_jax.sharding import MeshConfig, make_mesh


log = logging.getLogger(__name__)


def load_engine(
    checkpoint: files.PathLike,
    dtype: str = "float32",
    slots: int = 16,
    prefix_cache_tokens: int = 0,
    *,
    mesh: MeshConfig | None = None,
    context_length: int | None = None,
) -> Engine:
    """An engine with the model and the tokenizer of a folder in any known format.

    Args:
      slots, prefix_cache_tokens, context_length: see `Engine`.
      mesh: arrangement of all devices of the job, which share weights and rows; None: one device.

    Raises:
      ValueError, OSError: there is no such checkpoint, its tokenizer is missing or another model's, or the mesh does
        not divide the devices or the model.
    """
    tokenizer, config = load_tokenizer(checkpoint), read_model_config(checkpoint)
    check_rows(tokenizer, config)
    if config.head != "tokens":
        raise ValueError(f"{checkpoint} is a reward model: it gives no probabilities of tokens; name a language model")
    devices = None if mesh is None else make_mesh(mesh)
    if devices is None or devices.size == 1:
        model, params = load_for_decoding(checkpoint, dtype)
        return Engine(model, params, tokenizer, None, slots, context_length, prefix_cache_tokens=prefix_cache_tokens)
    model, params = load_pretrained(checkpoint, dtype, devices)
    return Engine(model, params, tokenizer, devices, slots, context_length, prefix_cache_tokens=prefix_cache_tokens)


def text_request(
    engine: Engine,
    prompt: Content,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    min_p: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    images: Sequence[Loaded] = (),
    constraint: Constraint | None = None,
) -> Request:
    """A request to continue text until the document or the turn ends.

    Args:
      prompt: text, in which names of control tokens stay text; or texts, pictures and regions.
      stop: further strings that end the continuation.
      max_new_tokens, seed: see `Request`.
      temperature, top_p, top_k, repetition_penalty, min_p, presence_penalty, frequency_penalty: see `SamplingConfig`.
      images: the pictures of `prompt`.
      constraint: as `schema_constraint` gives it; None: none.

    Raises:
      ValueError: a value is out of range.
    """
    sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty, min_p, presence_penalty, frequency_penalty)
    tokenizer, vision = engine.tokenizer, engine.model.config.vision
    assert tokenizer is not None  # `load_engine` gives one
    ids = content.encode(tokenizer, prompt, vision.num_queries if vision is not None else content.NUM_QUERIES)
    pixels = [image.pixels for image in images]
    return Request(
        ids,
        max_new_tokens,
        sampling,
        _stop_ids(engine),
        tuple(stop),
        seed,
        images=pixels,
        constraint=constraint,
    )


def _stop_ids(engine: Engine) -> tuple[int, int]:
    assert engine.tokenizer is not None  # `load_engine` gives one
    return engine.tokenizer.endoftext_id, engine.tokenizer.im_end_id


def schema_constraint(engine: Engine, path: files.PathLike | None) -> Constraint | None:
    """What lets continuations be JSON of the schema in a file; None without one. It needs the extra `serve`.

    Raises:
      ValueError, OSError: no such file, no schema, or words in it that are not known.
    """
    if path is None:
        return None
    from qwen_jax.inference.grammars import Grammars  # in here, as it needs the extra

    try:
        schema = files.read_json(path)
        if not isinstance(schema, dict):
            raise ValueError("expected a JSON schema, an object")
        return Grammars(engine.tokenizer, _stop_ids(engine), engine.model.config.vocab_size).json_schema(schema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def generate(
    *,
    checkpoint: files.PathLike,
    prompt: str,
    images: Sequence[str | Path] = (),
    image_label: str = "",
    boxes: str | Path | None = None,
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
    json_schema: files.PathLike | None = None,
    **options,
) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces of text.

    Args:
      checkpoint: run folder (Orbax), or a folder converted to `qwen` or `qwen2`.
      prompt, options: see `text_request`.
      images: files of pictures that stand before the prompt.
      image_label: text before each picture, see `qwen_jax.data.content.with_labels`.
      boxes: folder for the last picture with the boxes of the continuation, whose path is logged; None: none.
      dtype: compute dtype, "float32" or "bfloat16".
      mesh: see `load_engine`.
      json_schema: file with the schema of the JSON that continuations are constrained to; None: any text.

    Raises:
      ValueError, OSError: no such checkpoint, picture or schema, or a value out of range.
    """
    check_files(images)
    engine = load_engine(checkpoint, dtype, slots=1, mesh=mesh)
    whole, loaded = load_content(engine, prompt_with(images, prompt), image_label)
    constraint = schema_constraint(engine, json_schema)
    pieces = engine.stream(text_request(engine, whole, images=loaded, constraint=constraint, **options))

    def texts() -> Iterator[str]:
        said = []
        for piece in pieces:
            if piece.text:
                said.append(piece.text)
                yield piece.text
        if boxes is not None:
            for line in draw_reply("".join(said), images[-1] if images else None, boxes):
                log.warning(line)

    return texts()


def read_prompts(path: str | Path) -> list[Content]:
    """The `prompt` of each line of a JSON lines file: text, or a list of parts (`content.parse_parts`).

    Raises:
      OSError: no such file.
      ValueError: a line is no object with a text or parts `prompt`; the message names it.
    """
    prompts = []
    for where, line in files.read_json_lines(path):
        given = line.get("prompt") if isinstance(line, dict) else None
        if not isinstance(given, str | list):
            raise ValueError(f'{where}: expected an object with a text "prompt"')
        try:
            prompts.append(read_parts(given, "prompt"))
        except Unusable as error:
            raise ValueError(f"{where}: {error}") from error
    return prompts


def generate_all(
    *,
    checkpoint: files.PathLike,
    prompts: Sequence[Content],
    image_folder: str | Path = "",
    image_label: str = "",
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
    slots: int = 16,
    seed: int = 0,
    json_schema: files.PathLike | None = None,
    **options,
) -> Iterator[Result]:
    """Yields the results of many prompts as they finish; prompt i has seed + i.

    Args:
      prompts: as `read_prompts` gives them. Their pictures are read when it is their turn.
      image_folder: that the relative paths of pictures begin in.
      checkpoint, image_label, dtype, mesh, json_schema, options: as in `generate`.
      slots: the largest number of prompts in one batch.

    Raises:
      ValueError, OSError: as in `generate`; the message has the number of the prompt, from 0 on. A file that is
        missing is found before anything is generated, one that is damaged when it is its turn.
    """
    for number, prompt in enumerate(prompts):
        check_files(picture_paths(prompt, image_folder), f"prompt {number}: ")
    engine = load_engine(checkpoint, dtype, slots, mesh=mesh)
    constraint = schema_constraint(engine, json_schema)

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            try:
                whole, loaded = load_content(engine, prompt, image_label, image_folder)
            except (ValueError, OSError) as error:
                raise ValueError(f"prompt {number}: {error}") from error
            yield text_request(engine, whole, seed=seed + number, images=loaded, constraint=constraint, **options)

    plain = all(isinstance(prompt, str) for prompt in prompts)
    return engine.generate(list(requests()) if plain else requests())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.generate",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, help="run folder, or converted folder (qwen or qwen2)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help='JSON lines with a "prompt" each, text or a list of parts; results are JSON lines as they finish',
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        dest="images",
        type=path_argument,
        metavar="FILE",
        help="a picture before --prompt; may be repeated. In --prompts, they are parts, with paths relative to FILE",
    )
    parser.add_argument(
        "--image_label",
        default="",
        metavar="TEXT",
        help="text before each picture, with a line end after it; {number} is its number. The released chat models "
        'were trained with "Picture {number}: "',
    )
    parser.add_argument(
        "--boxes", type=path_argument, metavar="FOLDER", help="draw boxes of a continuation on its last picture there"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="largest number of new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the fewest tokens whose probabilities sum to this"
    )
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most probable tokens; 0: from all")
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="sample from tokens this times as probable as the most probable one"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: earlier tokens become less probable"
    )
    parser.add_argument(
        "--presence_penalty", type=float, default=0.0, help="subtracted from logits of tokens that were generated"
    )
    parser.add_argument(
        "--frequency_penalty", type=float, default=0.0, help="the same, times how often a token was generated"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the continuation at this text; may be repeated"
    )
    parser.add_argument(
        "--json_schema", type=path_argument, metavar="FILE", help="let continuations be JSON of the schema in this file"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    add_mesh(parser)
    parser.add_argument("--slots", type=int, default=16, help="number of prompts in one batch (with --prompts)")
    parser.add_argument("--verbose", action="store_true", help="log each compiled program")
    return parser


@programs_kept()
def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.generate`."""
    options = vars(_parser().parse_args(argv))
    if not options.pop("verbose"):
        logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    file, slots, boxes = options.pop("prompts"), options.pop("slots"), options["boxes"]
    if file is None:
        for piece in generate(**options):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    if options.pop("images"):
        raise ValueError('--image goes with --prompt: in --prompts, a picture is a part, {"type": "image", "image": …}')
    del options["prompt"], options["boxes"]
    prompts = read_prompts(file)
    for result in generate_all(prompts=prompts, image_folder=file.parent, slots=slots, **options):
        line = {
            "index": result.index,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "log_prob": float(result.log_probs.sum()),
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        if boxes is not None:
            shown = picture_paths(prompts[result.index], file.parent)
            for told in draw_reply(result.text or "", shown[-1] if shown else None, boxes):
                log.warning("prompt %d: %s", result.index, told)


if __name__ == "__main__":
    run(main)
