"""Pictures with text for the three stages of Qwen-VL (arXiv 2308.12966), one row an example; pack them by `whole`.

| task | rows |
|---|---|
| `vision_pairs` | `{"image": "a.png", "text": "a red square"}`; the text may be parts, with boxes |
| `vision_grounding` | the same, with boxes in each text: captions that say where things are (GRIT) |
| `vision_documents` | `{"content": [PART, …]}`: texts and pictures in any order |
| `vision_vqa` | `{"image": "a.png", "question": "What is red?", "answer": "the square"}` |
| `vision_referring` | `{"image": "a.png", "ref": "the square", "boxes": [[x1, y1, x2, y2]]}` |
| `vision_grounded_captions` | `{"image": "a.png", "boxes": [[x1, y1, x2, y2]], "text": "a red square"}` |
| `vision_ocr` | `{"image": "a.png", "lines": [{"text": "EXIT", "quad": [eight numbers]}, …]}` |
| `vision_text` | `{"text": "…"}`: a document without pictures, for mixtures |
| `vision_multitask` | a mixture of these, but `vision_documents`: the second stage |
| `vision_chat` | `{"messages": [{"role": "user", "content": [PART, …]}, …]}`, or another layout |
| `vision_chat_and_text` | a mixture of `vision_chat` and `vision_text` |

A PART is `{"type": "text", "text": …}`, `{"type": "image", "image": "a.png"}`, or `{"type": "box", "ref": …, "boxes":
[[x1, y1, x2, y2], …]}`. Paths are relative to the folder of the file with the rows; tars, Parquet and TFDS hold the
pictures themselves. Coordinates are thousandths of the width and height of the stored picture, integers in [0, 1000).
Rows become tokens in `qwen_jax.data.vision`; docs/how_to/vision_data.md shows all of them.
"""

from collections.abc import Callable, Mapping, Sequence

import gin

from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.content import NUM_QUERIES, PICTURE_LABEL
from qwen_jax.data.images import MAX_PIXELS
from qwen_jax.data.mixing import ConfiguredRate
from qwen_jax.data.picture_records import PictureRecords, picture_files
from qwen_jax.data.quick_seqio import seqio
from qwen_jax.data.records import add_task
from qwen_jax.data.vision import KINDS, VisionChatRows, VisionRows
from qwen_jax.files import Pattern

# Of pictures on the web, some percent are always damaged; more is a mistake.
MAX_LEFT_OUT_SHARE = 0.1


@gin.configurable
def picture_places(num_queries: int = NUM_QUERIES) -> int:
    """Places of a picture in the tokens of all these tasks: the `num_queries` of the model's configuration."""
    return num_queries


def _rows_of(kind: str) -> Callable[..., PictureRecords]:
    """The rows of the task `vision_` + `kind`, a gin configurable of that name."""
    task = f"vision_{kind}"

    @gin.configurable(task, module=__name__)
    def records(
        pattern: Pattern | Sequence[Pattern] | None = None,
        validation_share: float = 0.01,
        unusable: str = "stop",
        max_pixels: int = MAX_PIXELS,
        fields: Mapping[str, str] | None = None,
        max_left_out_share: float = MAX_LEFT_OUT_SHARE,
        layout: str = "",
    ) -> PictureRecords:
        """Rows with pictures, as the table above has them.

        Args:
            pattern: folder, glob, or list of these, of `.jsonl` and `.json` (also compressed), `.tar` and `.parquet`;
                or the folder of a TFDS dataset (`qwen_jax.data.picture_files`).
            validation_share: share of the pictures held out, with all their rows.
            unusable: `stop` names the first row that cannot be trained on, `leave_out` counts them by reason.
            max_pixels: largest width times height of a picture; larger ones are unusable, before they are decoded.
            fields: names in the files to names in rows, such as `{"caption": "text"}`; a list of texts makes several
                rows.
            max_left_out_share: caching ends with an error where a larger share of a split is left out.
            layout: a key of `qwen_jax.data.vision.LAYOUTS`, such as `grit`; "" is the table's.
        """
        return PictureRecords(
            picture_files(pattern, task),
            validation_share=validation_share,
            rows=VisionRows(kind, picture_places(), layout),
            unusable=unusable,
            max_pixels=max_pixels,
            fields=tuple((fields or {}).items()),
            max_left_out_share=max_left_out_share,
            task=task,
        )

    return records


@gin.configurable
def vision_chat(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    layout: str = "messages",
    loss_on: str = "released",
    system: str = DEFAULT_SYSTEM,
    label: str = PICTURE_LABEL,
    unusable: str = "stop",
    max_pixels: int = MAX_PIXELS,
    fields: Mapping[str, str] | None = None,
    max_left_out_share: float = MAX_LEFT_OUT_SHARE,
) -> PictureRecords:
    """Conversations with pictures; arguments as of the other tasks, and these.

    Args:
        layout: `messages`, `released` (the rows of the released `finetune.py`, with `<img>path</img>` in the text; only
            for files that you trust, since tags in it become control tokens) or `llava`.
        loss_on: `released` or `report`; see `qwen_jax.data.chat`.
        system: system message of a conversation without one.
        label: text before each picture, with `{number}` for its number in the conversation; "" for none.
    """
    rows = VisionChatRows(layout, loss_on, system, picture_places(), label)
    return PictureRecords(
        picture_files(pattern, "vision_chat"),
        validation_share=validation_share,
        rows=rows,
        unusable=unusable,
        max_pixels=max_pixels,
        fields=tuple((fields or {}).items()),
        max_left_out_share=max_left_out_share,
        task="vision_chat",
    )


for _kind in KINDS:
    add_task(f"vision_{_kind}", _rows_of(_kind), pictures=True)
add_task("vision_chat", vision_chat, pictures=True)


@gin.configurable
def multitask_rates(
    pairs: float = 19.7,
    vqa: float = 3.6,
    grounding: float = 3.5,
    referring: float = 8.7,
    grounded_captions: float = 8.7,
    ocr: float = 24.8,
    text: float = 7.8,
) -> dict[str, float]:
    """Rates of `vision_multitask`: the samples of the second stage in millions (arXiv 2308.12966, table 3).

    A task with rate 0 is left out, and needs no files.
    """
    return {
        "vision_pairs": pairs,
        "vision_vqa": vqa,
        "vision_grounding": grounding,
        "vision_referring": referring,
        "vision_grounded_captions": grounded_captions,
        "vision_ocr": ocr,
        "vision_text": text,
    }


seqio.MixtureRegistry.add("vision_multitask", [(name, ConfiguredRate(multitask_rates)) for name in multitask_rates()])


@gin.configurable
def vision_chat_and_text_rates(chat: float = 4.0, text: float = 1.0) -> dict[str, float]:
    """Rates of `vision_chat_and_text`: dialogues, and documents without pictures, so that text is not forgotten."""
    return {"vision_chat": chat, "vision_text": text}


seqio.MixtureRegistry.add(
    "vision_chat_and_text",
    [(name, ConfiguredRate(vision_chat_and_text_rates)) for name in vision_chat_and_text_rates()],
)
