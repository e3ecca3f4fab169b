"""What is said about the pictures of `tools/make_pictures.py`, in English and Chinese."""

import dataclasses

COLOR_NAMES = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
GRID = "grid"  # the language of captions that are maps


@dataclasses.dataclass(frozen=True)
class Language:
    """Words and sentences; `{}` takes what they are about."""

    name_of_language: str
    colors: dict[str, str]
    shapes: dict[str, str]
    plurals: dict[str, str]
    thing: str
    several: str
    numbers: tuple[str, ...]
    places: tuple[str, ...]  # of the nine cells, row by row
    at: str
    comma: str
    sign: str
    describe: tuple[str, ...]
    color: str
    shape: str
    count: str
    place: str
    cells: str
    find: tuple[str, ...]
    name: str
    read: tuple[str, ...]
    compare: dict[str, str]
    verdict: str
    same: tuple[str, str]


ENGLISH = Language(
    name_of_language="English",
    colors={one: one for one in COLOR_NAMES},
    shapes={one: one for one in SHAPES},
    plurals={"circle": "circles", "square": "squares", "triangle": "triangles"},
    thing="{color} {shape}",
    several="{number} {color} {shape}",
    numbers=("zero", "one", "two", "three", "four"),
    places=(
        *("top left", "top center", "top right"),
        *("middle left", "center", "middle right"),
        *("bottom left", "bottom center", "bottom right"),
    ),
    at="{place} {thing}",
    comma=", ",
    sign="the sign {}",
    describe=("Describe the picture.", "What do you see?"),
    color="What color is the {shape}?",
    shape="What shape is {color}?",
    count="How many shapes are there?",
    place="Where is the {shape}?",
    cells="What is in each cell?",
    find=("Find the {thing}.", "Where exactly is the {thing}?"),
    name="What is in {box}?",
    read=("Read the sign.", "What does the sign say?"),
    compare={
        "color": "Do both pictures have the same color?",
        "shape": "Do both pictures have the same shape?",
        "number": "Do both pictures have the same number?",
    },
    verdict="{}, {}: {}",
    same=("no", "yes"),
)
CHINESE = Language(
    name_of_language="Chinese",
    colors=dict(zip(COLOR_NAMES, ("红色", "绿色", "蓝色", "黄色"), strict=True)),
    shapes=dict(zip(SHAPES, ("圆形", "方形", "三角"), strict=True)),
    plurals=dict(zip(SHAPES, ("圆形", "方形", "三角"), strict=True)),
    thing="{color} {shape}",
    several="{number} 个 {color} {shape}",
    numbers=("零", "一", "两", "三", "四"),
    places=("左上", "中上", "右上", "左中", "正中", "右中", "左下", "中下", "右下"),
    at="{place} {thing}",
    comma="， ",
    sign="牌子 {}",
    describe=("描述图片。", "图里有什么？"),
    color="{shape}是什么颜色？",
    shape="{color}的是什么形状？",
    count="有几个图形？",
    place="{shape}在哪里？",
    cells="每格是什么？",
    find=("找到{thing}。", "框出{thing}。"),
    name="{box}里是什么？",
    read=("读出牌子。", "牌子上写了什么？"),
    compare={"color": "两张图颜色相同吗？", "shape": "两张图形状相同吗？", "number": "两张图数量相同吗？"},
    verdict="{}，{}：{}",
    same=("不同", "相同"),
)
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
