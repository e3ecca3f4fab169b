"""Files and folders that appear whole or not at all, locks on folders, JSON: on local disks and in buckets.

Every file that qwen_jax writes goes through this package, so that a reader never sees half of one and a killed process
leaves nothing but hidden temporary names, which `remove_unfinished` clears. Paths are `pathlib.Path`, or a `RemotePath`
for `gs://…` and `s3://…`.
"""

from .locks import LOCK_FILE, InUseError, locked, locked_in_turn
from .objects import ObjectChangedError, in_parallel
from .paths import (
    PathLike,
    Pattern,
    RemotePath,
    are_files,
    as_path,
    as_pattern,
    find,
    is_path_type,
    is_remote,
    sizes_below,
    sizes_in,
    sizes_of,
    statuses,
)
from .reading import (
    begin_reading,
    open_decompressed,
    open_file,
    opened_in_turn,
    read_json,
    read_json_lines,
    read_json_rows,
    read_range,
    read_ranges,
)
from .streams import new_stream
from .uploads import UploadsBehind, were_abandoned
from .whole import (
    copy_file,
    download_folder,
    json_line,
    local_copy,
    new_file,
    new_folder,
    remove_files,
    remove_tree,
    remove_unfinished,
    upload_folder,
    write_json,
    write_text,
)

__all__ = [
    "InUseError",
    "LOCK_FILE",
    "ObjectChangedError",
    "PathLike",
    "Pattern",
    "RemotePath",
    "UploadsBehind",
    "are_files",
    "as_path",
    "as_pattern",
    "begin_reading",
    "copy_file",
    "download_folder",
    "find",
    "in_parallel",
    "is_path_type",
    "is_remote",
    "json_line",
    "local_copy",
    "locked",
    "locked_in_turn",
    "new_file",
    "new_folder",
    "new_stream",
    "open_decompressed",
    "open_file",
    "opened_in_turn",
    "read_json",
    "read_json_lines",
    "read_json_rows",
    "read_range",
    "read_ranges",
    "remove_files",
    "remove_tree",
    "remove_unfinished",
    "sizes_below",
    "sizes_in",
    "sizes_of",
    "statuses",
    "upload_folder",
    "were_abandoned",
    "write_json",
    "write_text",
]
