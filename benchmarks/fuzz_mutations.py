"""Damage to files: of any bytes, and of what a format is made of, drawn by a seeded generator."""

from __future__ import annotations

import copy
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Mutation = Callable[[bytes, Random], bytes]

DEEP = 20_000
MOST_PLACES = 5_000
NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    1e308,
    1e-320,
)
TEXTS = (
    *("", " ", "\0", "\n", "x" * 100_000, "é" * 1000, "\u202e", "\ufeff", "\ud800", "\x1b[31m", "%s", "{}", "{text}"),
    *("../", "../../../../etc/passwd", "/etc/hostname", "/dev/zero", "/dev/stdin", "/proc/self/mem", ".", "~", "*"),
    *("zero.png", "pipe.png", "loop.png", "away.png", "folder.png", "http://localhost:1/a.png", "file:///etc/hostname"),
    *("data:image/png;base64,AAAA", "a" * 300, "con", "a/" * 3000, "<image>", "<|image|>", "<|end|>", "<|assistant|>"),
    *("nan", "null", "true", "none", "float16", "auto", "cuda", "eval", "__class__", "__proto__", "owner/name"),
    *("user", "assistant", "system", "tool", "image", "audio", "text", "video", "file", "train", "answer"),
)
OBJECTS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [None], [[]], {"": ""}, [0] * 1000, {"path": "/dev/zero"}, {"bytes": "AAAA"}),
    *({"type": "image", "path": "/etc/hostname"}, {"type": "image", "path": "a.png", "offset": 0, "size": 10**12}),
    *({"type": "text"}, {"type": "image", "task": "scenes", "medium": {}}, {"role": "user", "content": None}),
    *({"role": "tool", "content": [{"type": "text", "text": 3}]}, float("nan"), float("inf"), [float("-inf")]),
    *({"type": "image", "column": "a", "item": 10**9}, {"array": [0.0], "sampling_rate": 0}, {"image": {"image": {}}}),
)
YAML_LINES = (
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]",
    *(
        "loop: &loop [*loop]",
        "loop: &loop {a: *loop}",
        "a: *missing",
        "<<: {a: 1}",
        "<<: [1]",
        "<<: 3",
        "? [a, b]\n: c",
    ),
    *("a: !!python/object/apply:os.getpid []", "a: !!binary '####'", "a: !!set {b, c}", "a: !!omap [a]", "!!int x: 1"),
    *("a: !!timestamp 9999-99-99", "a: !!float x", "a: !x y", "---", "...", "%YAML 9.9", "\ta: 1", "? {a: 1}\n: b"),
    *("[" * DEEP, "{a: " * DEEP, "- " * DEEP, "a: " + "9" * 5000, "a: 1e999999999", "a: 0x" + "f" * 5000, "a: 1:2:3:4"),
    *("model: {hidden_size: 0}", "data: {train: [{kind: generated, task: addition, num_rows: 99999999999999}]}"),
    *("training: {deepspeed: /dev/zero}", "tokenizer: {path: /dev/zero}", "model: {path: ''}", "1: 2", "null: 3"),
)
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in 'abc' %}x{% endfor %}{% endfor %}{% endfor %}",
    *("{{ ''.__class__.__mro__ }}", "{{ messages[99].content.x.y }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"),
    *(
        "{{ 'x' * 999999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ range(999999999999) | list }}",
        "{% include 'a' %}",
        "{% if %}",
    ),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ nothing.at.all }}", "{{ messages | tojson(indent=9) }}"),
    *(
        "{{ messages | map('nothing') | list }}",
        "{{ messages['role'] }}",
        "{{ '%d' % 'x' }}",
        "{{ messages + 1 }}",
        "{{",
    ),
    *(
        "{% set messages = 3 %}{{ messages[0] }}",
        "{{ dict(a=1).a() }}",
        "{{ strftime_now('%Y') }}",
        "{% import 'os' as o %}",
    ),
    *("{{ '{:>999999999}'.format(1) }}", "{{ [1] | sum(start='a') }}", "{{ namespace(a=1).b.c }}", "{% break %}"),
)
WORDS = (
    *(text.encode("utf-8", "surrogatepass") for text in TEXTS),
    *(b"null", b"NaN", b"-Infinity", b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000, b"1e999999", b"\\ud800", b"\\u0000"),
    *(b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 512, b"\r", b"\r\n", b"\n\n", b'"', b"'", b",", b"}{", b"#"),
)


def mutate(content: bytes, suffix: str, rng: Random) -> bytes:
    """The content of a file with one to three kinds of damage.

    Args:
        suffix: of its name; those in `STRUCTURAL` are also changed by what they are made of.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _mutation(suffix, rng)(content, rng)
    return content


def _mutation(suffix: str, rng: Random) -> Mutation:
    of_format, drawn = STRUCTURAL.get(suffix), rng.random()
    if of_format is not None and drawn < 0.6:
        return of_format
    if suffix in TEXT_SUFFIXES and drawn < 0.85:
        return insert_word
    return rng.choice(BYTES)


# --------------------------------------------------------------------------------------------------------------- bytes


def flip_bits(content: bytes, rng: Random) -> bytes:
    """Up to 16 bits are turned over."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 16) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(content: bytes, rng: Random) -> bytes:
    """Up to 8 bytes are set, at the front or anywhere."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(rng.choice((len(changed), min(64, len(changed)))))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(changed)


def set_number(content: bytes, rng: Random) -> bytes:
    """A number of 2, 4 or 8 bytes is replaced by an odd one."""
    kind = rng.choice(("<h", ">h", "<i", ">i", "<q", ">q"))
    size = struct.calcsize(kind)
    limit = 2 ** (8 * size - 1)
    number = rng.choice((0, 1, -1, limit - 1, -limit, rng.randrange(limit)))
    at = rng.randrange(max(1, min(len(content), rng.choice((64, 512, len(content) or 1)))))
    return content[:at] + struct.pack(kind, number) + content[at + size :]


def truncate(content: bytes, rng: Random) -> bytes:
    """The end is missing, or zero."""
    at = rng.choice((0, 1, rng.randrange(len(content) + 1), max(0, len(content) - rng.randint(1, 9))))
    return content[:at] + bytes(max(0, len(content) - at)) * (rng.random() < 0.3)


def move_chunk(content: bytes, rng: Random) -> bytes:
    """A chunk is left out, doubled, or put somewhere else."""
    start = rng.randrange(len(content) + 1)
    chunk = content[start : start + rng.choice((1, 4, 16, 64, 1024))]
    rest = content[:start] + content[start + len(chunk) :]
    at = rng.randrange(len(rest) + 1)
    return rng.choice((rest, content[:start] + chunk + content[start:], rest[:at] + chunk + rest[at:]))


def insert_word(content: bytes, rng: Random) -> bytes:
    """An odd word stands anywhere, in place of what is there or before it."""
    at, word = rng.randrange(len(content) + 1), rng.choice(WORDS)
    return content[:at] + word + content[at + rng.choice((0, 0, len(word), 1)) :]


def encode_anew(content: bytes, rng: Random) -> bytes:
    """A byte-order mark, or another encoding."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return b"\xef\xbb\xbf" + content
    return text.encode(rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7")), "replace")


def random_bytes(content: bytes, rng: Random) -> bytes:
    """Nothing of what was there."""
    return rng.randbytes(rng.choice((0, 1, 16, 512, len(content))))


BYTES = (*[flip_bits, set_bytes, set_number, truncate, move_chunk, insert_word] * 2, encode_anew, random_bytes)
TEXT_SUFFIXES = {".json", ".jsonl", ".yaml", ".csv", ".txt", ".jinja"}


# --------------------------------------------------------------------------------------------------------------- trees


def odd_value(rng: Random) -> Any:
    """What hardly anybody expects."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, OBJECTS))))


def change_tree(tree: Any, rng: Random) -> Any:
    """A value is replaced, wrapped, moved or removed, or its key renamed, anywhere in dicts and lists."""
    places = list(_places(tree))
    if not places or rng.random() < 0.03:
        return odd_value(rng)
    holder, key = rng.choice(places)
    other, other_key = rng.choice(places)
    change = rng.randrange(9)
    if change <= 3:
        holder[key] = odd_value(rng)
    elif change == 4:
        holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, str(holder[key]), [holder[key]] * 50))
    elif change == 5:
        holder[key] = copy.deepcopy(other[other_key])
    elif change == 6:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice((odd_value(rng), copy.deepcopy(holder[key]))))
    elif change == 7:
        holder[rng.choice((*TEXTS, str(key).upper(), f"{key}s", f" {key}"))] = holder.pop(key)
    else:
        holder[rng.choice(TEXTS)] = odd_value(rng)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Holder and key of the first values, as many as there are within a bound: trees of YAML may hold themselves."""
    places: list[tuple[Any, Any]] = []
    holders = [tree]
    while holders and len(places) < MOST_PLACES:
        holder = holders.pop(0)
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        places += [(holder, key) for key in keys]
        holders += [holder[key] for key in keys]
    return places


def change_json(content: bytes, rng: Random) -> bytes:
    """Another tree, written as JSON."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return insert_word(content, rng)
    return _json(change_tree(tree, rng), rng)


def _json(tree: Any, rng: Random) -> bytes:
    """Lone surrogates stand there escaped, or as bytes that are no UTF-8."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def change_json_lines(content: bytes, rng: Random) -> bytes:
    """A line is another tree, doubled, or a line of very many bytes."""
    lines = content.splitlines(keepends=True) or [b"{}\n"]
    at = rng.randrange(len(lines))
    if rng.random() < 0.1:
        lines.insert(at, rng.choice((lines[at], b" " * 2_000_000 + b"\n", b'{"text": "' + b"x" * 2_000_000 + b'"}\n')))
    else:
        lines[at] = change_json(lines[at], rng).replace(b"\n", b"") + b"\n"
    return b"".join(lines)


def change_yaml(content: bytes, rng: Random) -> bytes:
    """Another tree, written as YAML, or odd lines between the others."""
    if rng.random() < 0.4:
        lines = content.decode("utf-8", "surrogateescape").split("\n")
        lines.insert(rng.choice((0, rng.randrange(len(lines) + 1), len(lines))), rng.choice(YAML_LINES))
        return "\n".join(lines).encode("utf-8", "surrogateescape")
    try:
        tree = yaml.safe_load(content)
    except (ValueError, yaml.YAMLError, RecursionError):
        return insert_word(content, rng)
    tree = change_tree(tree, rng)
    try:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):  # a number of very many digits
        return insert_word(content, rng)


def change_template(content: bytes, rng: Random) -> bytes:
    """An odd piece of a template stands somewhere, or alone."""
    piece = rng.choice(TEMPLATES).encode()
    at = rng.choice((0, rng.randrange(len(content) + 1), len(content)))
    return piece if rng.random() < 0.3 else content[:at] + piece + content[at:]


# -------------------------------------------------------------------------------------------------------- binary files


def change_safetensors(content: bytes, rng: Random) -> bytes:
    """Another header over the same weights, or weights that are not finite."""
    size = int.from_bytes(content[:8], "little")
    header, weights = content[8 : 8 + size], content[8 + size :]
    if len(header) < size or rng.random() < 0.25:
        odd = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
        at = 4 * rng.randrange(len(weights) // 4 + 1)
        many = rng.choice((1, 16, len(weights) // 4))
        return content[:8] + header + (weights[:at] + odd * many + weights[at + 4 * many :])[: len(weights)]
    header = change_json(header, rng)
    return len(header).to_bytes(8, "little") + header + weights


def change_png(content: bytes, rng: Random) -> bytes:
    """A chunk is changed, moved or added, with its checksum as it should be."""
    chunks = _png_chunks(content)
    if not chunks:
        return flip_bits(content, rng)
    at = rng.randrange(len(chunks))
    name, data = chunks[at]
    change = rng.randrange(4)
    if change == 0 and name == b"IHDR" and len(data) == 13:
        sides = [rng.choice((0, 1, 31, 40_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
        chunks[at] = (name, struct.pack(">II", *sides) + bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5)))
    elif change == 1:
        chunks.insert(at + 1, rng.choice(_ODD_CHUNKS))
    elif change == 2:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks.pop(at))
    else:
        chunks[at] = (name, rng.choice((flip_bits, set_number, truncate, move_chunk))(data, rng))
    pieces = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return content[:8] + b"".join(pieces)


_BOMB = zlib.compress(bytes(50_000_000))
_ODD_CHUNKS = (
    (b"zTXt", b"a\0\0" + _BOMB),
    (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + _BOMB),
    (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="99999999999999999999"/>'),
    (b"iCCP", b"a\0\0" + _BOMB),
    (b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\x06\0\0\0"),
    (b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\4abcd\0\0\0\x08"),
    (b"tEXt", b"Raw profile type exif\0\nexif\n99999999\n4d4d002a"),
    (b"tRNS", bytes(300)),
    (b"acTL", b"\xff" * 8),
    (b"fcTL", b"\0" * 26),
    (b"PLTE", b""),
    (b"IEND", b""),
)


def _png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def change_tar(content: bytes, rng: Random) -> bytes:
    """A member has another name, type, size, order or content, written as a whole tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            readable = (info for info in tar if info.isreg() and not info.sparse and 0 <= info.size <= len(content))
            members = [(info, tar.extractfile(info).read()) for info in readable]
    except (tarfile.TarError, OSError, ValueError, OverflowError, AttributeError):
        members = []
    if not members:
        return flip_bits(content, rng)
    at = rng.randrange(len(members))
    info, data = members[at]
    change, declared = rng.randrange(7), None
    if change == 0:
        info.name = rng.choice(
            (*(text for text in TEXTS if "\0" not in text), "0.", ".png", "0.png.txt", "0.json", "a.b.c")
        )
    elif change == 1:
        info.type = rng.choice((*(bytes([kind]) for kind in b"1234567LKSxgZ"), b"\xff"))
        info.linkname = rng.choice(("0.png", "/dev/zero", "../../etc/passwd", ""))
    elif change == 2:
        info.pax_headers = {
            rng.choice(("size", "path", "GNU.sparse.map", "GNU.sparse.size", "mtime")): rng.choice(
                ("-1", "99999999999999", "x", "1,2,3", "", "0,99999999999,0,1")
            )
        }
    elif change == 3:
        declared = rng.choice((0, len(data) + 1, 2**31, 2**40, -1))
    elif change == 4:
        members.insert(rng.randrange(len(members) + 1), members[at] if rng.random() < 0.5 else members.pop(at))
    elif change == 5:
        data = mutate(data, "." + info.name.rpartition(".")[2], rng)
    else:
        odd = {"caption": odd_value(rng), "png": odd_value(rng), "__key__": odd_value(rng)}
        members.append((tarfile.TarInfo(f"some.folder/{rng.randrange(3)}.json"), _json(odd, rng)))
    members = [(info, data) if number == at else pair for number, pair in enumerate(members)]
    try:
        return _write_tar(members, at, declared, rng)
    except (ValueError, OverflowError):  # not every header can be written
        return flip_bits(content, rng)


def _write_tar(members: list, at: int, declared: int | None, rng: Random) -> bytes:
    buffer, form = io.BytesIO(), rng.choice((tarfile.PAX_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    for number, (info, data) in enumerate(members):
        info.size = len(data) if declared is None or number != at else declared
        buffer.write(info.tobuf(form, "utf-8", "surrogateescape" if form == tarfile.GNU_FORMAT else "surrogatepass"))
        buffer.write(data + bytes(-len(data) % 512))
    return buffer.getvalue() + bytes(1024)


def change_table(content: bytes, rng: Random) -> bytes:
    """A column of a parquet file has another name, type or values, or its schema other notes; a whole file."""
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError):
        return flip_bits(content, rng)
    buffer = io.BytesIO()
    try:
        pq.write_table(changed_table(table, rng), buffer, compression=rng.choice(("none", "snappy", "zstd", "gzip")))
    except (pa.ArrowException, ValueError, TypeError, OverflowError):  # not every column can be written
        return flip_bits(content, rng)
    return buffer.getvalue()


def change_arrow(content: bytes, rng: Random) -> bytes:
    """The same for a stream of Arrow."""
    buffer = io.BytesIO()
    try:
        table = changed_table(pa.ipc.open_stream(content).read_all(), rng)
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write_table(table)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError):
        return flip_bits(content, rng)
    return buffer.getvalue()


def changed_table(table: pa.Table, rng: Random) -> pa.Table:
    """A table with another column, or another schema."""
    if table.num_columns == 0:
        return pa.table({"text": [odd_value(rng)]})
    at = rng.randrange(table.num_columns)
    name, column = table.column_names[at], table.column(at)
    change = rng.randrange(7)
    if change <= 1:
        values = _odd_column(len(table), rng)
        return table.set_column(at, name, values)
    if change == 2:
        return table.rename_columns(
            [rng.choice(TEXTS[:30]) if it == at else old for it, old in enumerate(table.column_names)]
        )
    if change == 3:
        return rng.choice((table.remove_column(at), table.append_column(name, column), table.slice(0, 0)))
    if change == 4:
        notes = {key: change_json(value, rng) for key, value in (table.schema.metadata or {}).items()}
        odd = {
            "info": {"features": {name: {"_type": rng.choice(("Image", "Audio", "Value", "ClassLabel", "Nothing"))}}}
        }
        return table.replace_schema_metadata(notes or {b"huggingface": _json(odd, rng)})
    values = column.to_pylist()
    values[rng.randrange(len(values))] = None
    if change == 5 and len(values) > 1 and isinstance(values[0], (dict, list)):
        values = change_tree(values, rng)
        values = values if isinstance(values, list) else [values]
        values = (values + [None] * len(table))[: len(table)]
        return table.set_column(at, name, pa.array(values))
    return table.set_column(at, name, pa.array(values, type=column.type))


def _odd_column(rows: int, rng: Random) -> pa.Array:
    kinds = (
        *(pa.null(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.string(), pa.large_string()),
        *(pa.binary(), pa.large_binary(), pa.date32(), pa.timestamp("ns"), pa.duration("s"), pa.decimal128(9, 2)),
        *(pa.list_(pa.string()), pa.list_(pa.int64()), pa.large_list(pa.binary()), pa.struct([]), pa.string_view()),
        *(
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            pa.list_(pa.float32(), 2),
            pa.month_day_nano_interval(),
        ),
        *(pa.map_(pa.string(), pa.int32()), pa.dictionary(pa.int32(), pa.string()), pa.binary(4), pa.time64("us")),
    )
    kind, value = rng.choice(kinds), None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        value = rng.choice(TEXTS)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        value = rng.choice(WORDS)
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or kind == pa.float64():
        value = 1
    elif pa.types.is_struct(kind) and kind.num_fields:
        value = {"bytes": rng.choice((None, b"", rng.choice(WORDS))), "path": rng.choice((None, "/dev/zero", "a.png"))}
    elif kind == pa.list_(pa.string()):
        value = [rng.choice(TEXTS), None]
    try:
        return pa.array([value] * rows, type=kind)
    except (UnicodeEncodeError, pa.ArrowException):
        return pa.nulls(rows)


STRUCTURAL: dict[str, Mutation] = {
    ".json": change_json,
    ".jsonl": change_json_lines,
    ".yaml": change_yaml,
    ".jinja": change_template,
    ".safetensors": change_safetensors,
    ".png": change_png,
    ".tar": change_tar,
    ".parquet": change_table,
    ".arrow": change_arrow,
}
"""By the suffix of a file."""
