"""A checkpoint as a model of EleutherAI's lm-evaluation-harness 0.4.13: its tasks run on our engine.

    from lm_eval import simple_evaluate
    results = simple_evaluate(HarnessModel(load_engine("runs/tiny")), tasks=["arc_easy"])

Log-likelihoods are those of the harness's own `HFLM` on the exported weights. What differs, on purpose:

- names of control tokens in a text stay text; only `apply_chat_template` puts control tokens into a prompt;
- a context of white space stands after `<|endoftext|>`, where HFLM fails;
- a continuation whose border with its context lies within a token is encoded apart, where HFLM fails;
- `<|im_end|>` ends a generated text, too;
- arguments of generation that the engine has not are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from qwen_jax.data import chatml
from qwen_jax.evaluation.encoding import cut_left, cut_pair, encode_continuations, encode_prompt
from qwen_jax.inference import Engine, Request, SamplingConfig

# Continuations that are scored together, and then kept by the harness's cache.
PAIRS_AT_ONCE = 2048
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


class HarnessModel(LM):
    """A model of the harness on an engine.

    In a job of several processes each of them evaluates the same tasks, and each gets the results.

    Args:
        engine: with a tokenizer.
        max_gen_toks: largest number of tokens of a continuation, where the task does not say.
        think_end_token: text that ends the thinking of a model, such as "</think>". It and what precedes it are cut
            off before stop strings are looked for.
        seed: of sampled continuations; that of the i-th request is `seed` + i.
    """

    def __init__(self, engine: Engine, *, max_gen_toks: int = 256, think_end_token: str | None = None, seed: int = 0):
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("the harness gives text: the engine needs a tokenizer, Engine(…, tokenizer=…)")
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.max_gen_toks, self.think_end_token, self.seed = max_gen_toks, think_end_token, seed
        self._chats: dict[str, list[int]] = {}  # text of `apply_chat_template`: its ids

    @property
    def max_length(self) -> int:
        """Number of tokens that the model reads at most."""
        return self.engine.context_length

    @property
    def prefix_token_id(self) -> int:
        """`<|endoftext|>`, which stands before a text without context."""
        return self.tokenizer.endoftext_id

    @property
    def tokenizer_name(self) -> str:
        """Names the vocabulary and the chat format, for the harness's cache of requests."""
        return f"qwen_jax-chatml-{self.tokenizer.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the only chat format, ChatML; None: no format is wanted."""
        return "chatml" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in ChatML, as text.

        The text is encoded with control tokens between the messages; names of control tokens in a message stay text.

        Args:
            add_generation_prompt: False leaves the last message, which is the assistant's, open.

        Raises:
            ValueError: a message has another role than system, user and assistant, or another conversation, with
                names of control tokens in its messages, has the same text.
        """
        turns = chatml.turns(self.tokenizer, chat_history)
        if add_generation_prompt:
            ids = chatml.encode_prompt(self.tokenizer, chat_history)
        else:
            ids = [token for turn in turns for token in turn.ids]
            ids = ids[: len(ids) - len(turns[-1].footer)]
        text = self.tokenizer.decode(ids)
        if self._chats.setdefault(text, ids) != ids:
            raise ValueError(f"two conversations have the text {text[-60:]!r}, one with names of control tokens in it")
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of the continuation of each request.

        Contexts that leave too little room are cut from the left.

        Raises:
            ValueError: a continuation is empty, or fills the context of the model.
        """
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.args[0], []).append(place)
        found: dict[int, tuple[float, bool]] = {}
        # Sorted, so that contexts with the same examples come together.
        windows = _windows([(context, places[context]) for context in sorted(places)])
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or None) as bar:
            for window in windows:
                pairs, of_window = [], []
                for context, some in window:
                    prompt, following = self._encode(context, [requests[place].args[1] for place in some])
                    # The model does not read the last token, so that the context may have one more.
                    pairs += [
                        cut_pair(prompt, ids, self.max_length + 1, whole_text=not context.strip()) for ids in following
                    ]
                    of_window += some
                scores = self.engine.score(*_shared_prompts(pairs))
                for place, score in zip(of_window, scores, strict=True):
                    found[place] = float(score.log_probs.astype("float64").sum()), bool(score.most_likely.all())
                    self.cache_hook.add_partial("loglikelihood", requests[place].args, found[place])
                bar.update(len(of_window))
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text after `<|endoftext|>`, in nats: each token once, after as many as can be.

        Long texts are cut into windows by the harness's own rule.
        """
        prompts, continuations, owners = [], [], []
        for place, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tokenizer.encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for window in windows:
                context, continuation = utils.make_disjoint_window(window)
                prompts.append(context)
                continuations.append(continuation)
                owners.append(place)
        totals = [0.0] * len(requests)
        for start in tqdm(
            range(0, len(owners), PAIRS_AT_ONCE), desc="loglikelihood_rolling", disable=disable_tqdm or None
        ):
            part = slice(start, start + PAIRS_AT_ONCE)
            for owner, score in zip(owners[part], self.engine.score(prompts[part], continuations[part]), strict=True):
                totals[owner] += float(score.log_probs.astype("float64").sum())
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings.

        Raises:
            ValueError: an argument of generation is unknown, or leaves no room for a context.
        """
        stops, asked = [], []
        for place, request in enumerate(requests):
            stop, one = self._request(request.args[0], request.args[1], self.seed + place)
            stops.append(stop)
            asked.append(one)
        texts: list[str] = [""] * len(requests)
        bar = tqdm(self.engine.generate(asked), total=len(asked), desc="generate_until", disable=disable_tqdm or None)
        for result in bar:
            # As HFLM, without control tokens; the engine's text has their names.
            written = self.tokenizer.decode([token for token in result.tokens if token < self.tokenizer.num_ranks])
            text = postprocess_generated_text(written, stops[result.index], self.think_end_token)
            texts[result.index] = text
            self.cache_hook.add_partial("generate_until", requests[result.index].args, text)
        return texts

    def _request(self, context: str, arguments: Mapping[str, Any], seed: int) -> tuple[list[str], Request]:
        """Stop strings of a request, and the request to the engine."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        stop = [text for text in known.pop("until") if text]
        limit, sampled = known.pop("max_gen_toks"), known.pop("do_sample")
        temperature = float(known.pop("temperature", 0.0))
        if sampled and temperature == 0:
            raise ValueError("do_sample asks for sampling, but temperature is 0 or not given: give a positive one")
        rules = {name: known.pop(name) for name in _SAMPLING if name in known}
        if known:
            raise ValueError(f"the engine has no argument {', '.join(known)} of generation: take it out of the task")
        if limit >= self.max_length:
            raise ValueError(f"max_gen_toks is {limit}, and the model reads {self.max_length} tokens in all: lower it")
        ids = self._chat_ids(context)
        prompt = cut_left(encode_prompt(self.tokenizer, context) if ids is None else ids, self.max_length - limit)
        return stop, Request(
            prompt.ids,
            limit,
            SamplingConfig(temperature, **rules) if sampled else SamplingConfig(),
            chatml.stop_ids(self.tokenizer),
            # Thinking may have them, too.
            () if self.think_end_token else tuple(stop),
            seed,
        )

    def _encode(self, context: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        ids = self._chat_ids(context)
        if ids is None:
            return encode_continuations(self.tokenizer, context, continuations)
        if "" in continuations:
            raise ValueError(f"a continuation of {context[-60:]!r} is empty")
        return ids, [self.tokenizer.encode(text) for text in continuations]

    def _chat_ids(self, context: str) -> list[int] | None:
        """Token ids of a context that begins with a conversation of `apply_chat_template`; None: it does not."""
        if context in self._chats:
            return self._chats[context]
        # With a beginning of the answer (gen_prefix).
        begun = [text for text in self._chats if context.startswith(text)]
        if not begun:
            return None
        longest = max(begun, key=len)
        return self._chats[longest] + self.tokenizer.encode(context[len(longest) :])


def _windows(groups: Sequence[tuple[str, list[int]]]) -> Iterator[list[tuple[str, list[int]]]]:
    """The contexts in parts of about `PAIRS_AT_ONCE` continuations."""
    window, pairs = [], 0
    for group in groups:
        window.append(group)
        pairs += len(group[1])
        if pairs >= PAIRS_AT_ONCE:
            yield window
            window, pairs = [], 0
    if window:
        yield window


def _shared_prompts(pairs: Sequence) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, continuations) of cut pairs; equal prompts that follow each other are one object."""
    prompts: list[list[int]] = []
    for prompt, _ in pairs:
        same = bool(prompts) and prompts[-1] == prompt.ids
        prompts.append(prompts[-1] if same else prompt.ids)
    return prompts, [continuation for _, continuation in pairs]
