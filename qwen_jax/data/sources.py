"""SeqIO sources of corpora in files and of datasets of TFDS."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence

from qwen_jax.data.corpora import Corpus
from qwen_jax.data.quick_seqio import seqio, tf


class DocumentSource(seqio.DataSource):
    """SeqIO source of a corpus of files, with splits `train` and `validation`.

    Files are dealt to at most `num_shards` input shards, which Beam workers read in parallel.

    Args:
        corpus: called when the source is used, not when the task is registered, so that gin may configure it.
        num_shards: upper bound on input shards.

    Attributes:
        corpus: as given.
    """

    def __init__(self, corpus: Callable[[], Corpus], *, num_shards: int = 64):
        super().__init__(splits=("train", "validation"))
        self.corpus, self._num_shards = corpus, num_shards

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a file is the smallest piece."""
        return False

    @property
    def max_left_out_share(self) -> float:
        """See `Corpus`; raises as the function that makes it."""
        return self.corpus().max_left_out_share

    def list_shards(self, split: str) -> list[str]:
        """Names of the input shards."""
        self._check(split)
        count = self.count_shards(self.corpus())
        return [f"files-{index:05d}-of-{count:05d}" for index in range(count)]

    def count_shards(self, corpus: Corpus) -> int:
        """Number of the input shards, given what `corpus()` gave."""
        return min(self._num_shards, len(corpus.files))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length=None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Documents as `{"text": string, "source": string}` scalars, and what else the corpus gives for them.

        `shuffle` does not change the order.
        """
        del shuffle, seed, sequence_length, use_cached, num_epochs
        self._check(split)
        corpus = self.corpus()
        count, index = (shard_info.num_shards, shard_info.index) if shard_info else (1, 0)
        signature = {
            name: tf.TensorSpec([None] if several else [], tf.string) for name, several in corpus.features().items()
        }
        return tf.data.Dataset.from_generator(lambda: corpus.shard(split, index, count), output_signature=signature)

    def describe(self) -> dict:
        """The identity of the corpus: a cache keeps it, and refuses another corpus."""
        corpus = self.corpus()
        # As texts: those of a bucket have no names that `os.path` takes.
        base = os.path.commonpath([str(path.parent) for path in corpus.files])
        names = (os.path.relpath(str(path), base) for path in corpus.files)
        listing = [(name, status.st_size) for name, status in zip(names, corpus.statuses(), strict=True)]
        return {
            "files": len(listing),
            "file_bytes": sum(size for _, size in listing),
            "listing": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "validation_share": corpus.validation_share,
        } | corpus.settings()

    def _check(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"no split {split!r} in a corpus of files; there are {', '.join(self.splits)}")


class TfdsSource(seqio.TfdsDataSource):
    """A TFDS dataset that is on disk already. SeqIO's own source would download and prepare a missing one.

    Args:
        name: name, configuration and version, such as `wikipedia/20230601.en:1.0.0`.
        splits: split names here to splits or slices there.
    """

    def __init__(self, name: str, splits: Mapping[str, str]):
        super().__init__(name, splits=splits, read_only=True)

    # SeqIO caches its method with functools.lru_cache, whose type is no method's.
    def list_shards(self, split: str) -> Sequence[str]:  # ty: ignore[incompatible-attribute-override]
        """Names of the files.

        Raises:
            FileNotFoundError: the dataset is not on disk; the message says how to get it.
        """
        self._check()
        return super().list_shards(split)

    def get_dataset(self, split: str | None = "train", *args, **kwargs) -> tf.data.Dataset:
        """As in SeqIO; raises like `list_shards`."""
        self._check()
        return super().get_dataset(split, *args, **kwargs)

    def _check(self) -> None:
        loader = self.tfds_dataset
        if not loader.builder.info.splits:
            assert loader.name is not None  # given to the constructor
            name = loader.name.partition(":")[0]
            raise FileNotFoundError(
                f"the TFDS dataset {loader.name} is not in {loader.builder.data_path}: get it with `tfds build {name}` "
                "(public corpora are large: see https://www.tensorflow.org/datasets/catalog), and set TFDS_DATA_DIR "
                "if it lies elsewhere"
            )
