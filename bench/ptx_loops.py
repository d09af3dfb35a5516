"""What a kernel's main loop does in one turn, read from the PTX that nvcc writes.

Finds the loop, walks every way round it that touches global memory only 16 bytes at a time, and
counts accesses and instructions. PTX is what the compiler hands to ptxas, not what the card runs:
registers and the order of instructions are settled later. Compiles nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

# How many instructions of the card one PTX instruction becomes, where it is not one. Read from what
# nvdisasm 13.5 shows for sm_90: the usual path of a correctly rounded division or square root, with
# the branch round the rare one. Copies between registers mostly vanish.
COSTS = {"div.rn.f32": 10, "sqrt.rn.f32": 10, "mov": 0, "cvta": 0}
# Those that wait for the special function units: a reciprocal and the test of its operands; a root.
SPECIAL = {"div.rn.f32": 2, "sqrt.rn.f32": 1}

_BITS = re.compile(r"\.(?:[busf])(8|16|32|64)$")
_VECTOR = re.compile(r"\.v(\d)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with all modifiers, registers written first, then the rest."""

    opcode: str
    operands: str
    guard: str | None = None  # "%p3" or "!%p3"

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def accesses_global(self) -> bool:
        """A load or store of global memory, or of memory of which the compiler does not know."""
        if self.kind not in ("ld", "st", "atom", "red"):
            return False
        return not re.search(r"\.(param|shared|local|const)\b", self.opcode)

    @property
    def is_wide(self) -> bool:
        """An access of at least 16 bytes that the compiler knows to be global memory."""
        bits, vector = _BITS.search(self.opcode), _VECTOR.search(self.opcode)
        width = int(bits[1]) * (int(vector[1]) if vector else 1) if bits else 0
        return self.accesses_global and ".global" in self.opcode and width >= 128

    @property
    def written(self) -> list[str]:
        """Registers that it writes."""
        if self.kind in ("st", "bra", "bar", "red", "ret", "exit"):
            return []
        match = re.match(r"\s*(\{[^}]*\}|[^,]+)", self.operands)
        return re.findall(r"%\w+", match[1]) if match else []

    @property
    def read(self) -> list[str]:
        """Registers that it reads."""
        registers = re.findall(r"%\w+", self.operands)
        return registers[len(self.written) :] + re.findall(r"%\w+", self.guard or "")

    @property
    def cost(self) -> int:
        """Instructions that the card issues for it, roughly."""
        if self.opcode == "bra.uni":
            return 0
        return COSTS.get(self.opcode, COSTS.get(self.kind, 1))


@dataclass
class Block:
    """Instructions that run one after the other, and where control goes then."""

    body: list[Instruction] = field(default_factory=list)
    taken: str | None = None  # target of the branch at its end
    after: str | None = None  # the block that follows when the branch is not taken


@dataclass(frozen=True)
class Turn:
    """One way round a loop."""

    body: tuple[Instruction, ...]

    @property
    def loads(self) -> int:
        """16-byte loads."""
        return sum(i.kind == "ld" and i.is_wide for i in self.body)

    @property
    def stores(self) -> int:
        """16-byte stores."""
        return sum(i.kind == "st" and i.is_wide for i in self.body)

    @property
    def loads_in_flight(self) -> int:
        """16-byte loads that are sent off before the first value of one is needed."""
        loaded: set[str] = set()
        count = 0
        for instruction in self.body:
            if loaded.intersection(instruction.read):
                break
            if instruction.kind == "ld" and instruction.is_wide:
                loaded.update(instruction.written)
                count += 1
        return count

    @property
    def instructions(self) -> int:
        """Instructions that the card issues, roughly."""
        return sum(i.cost for i in self.body)

    @property
    def special(self) -> int:
        """Operations of the special function units."""
        return sum(SPECIAL.get(i.opcode, 0) for i in self.body)

    @property
    def float64(self) -> int:
        """Operations of the float64 units, conversions included."""
        return sum(".f64" in i.opcode and i.kind not in ("mov", "ld", "st") for i in self.body)


class _Way(NamedTuple):
    cost: int
    previous: tuple[object, ...] | None
    block: str


class Kernel:
    """One entry of a PTX file."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.param_bytes = int(re.findall(r"\.param [^\n]*\[(\d+)\]", text)[0])
        self.threads = int(re.findall(r"\.maxntid (\d+)", text)[0])
        self.blocks = _blocks_of(text)
        self._loops = _loops_of(self.blocks)

    def turns(self) -> dict[tuple[int, int], list[Turn]]:
        """Ways round the loops with 16-byte accesses and no narrower one of global memory.

        Returns:
            For each number of 16-byte (loads, stores): the cheapest way under each choice of what
            does not change while the loop runs (dtypes, options), cheapest first.
        """
        found: dict[tuple[int, int], list[Turn]] = defaultdict(list)
        for head, body in self._loops.items():
            for turn in _turns_of(self.blocks, head, body):
                if turn.loads:
                    found[turn.loads, turn.stores].append(turn)
        for turns in found.values():
            turns.sort(key=lambda turn: turn.instructions)
        return dict(found)


def kernels_of(ptx: str) -> list[Kernel]:
    """The kernels of a PTX file."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    parts = re.split(r"^\.(?:visible|weak) \.entry (\w+)", ptx, flags=re.MULTILINE)[1:]
    return [Kernel(name, text) for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _blocks_of(text: str) -> dict[str, Block]:
    """Basic blocks by label, in the order of the text; the first is "entry"."""
    body = text[text.index("\n{") + 2 : text.index("\n}")]
    blocks: dict[str, Block] = {"entry": Block()}
    current, ended = "entry", False
    pattern = r"(\$\w+):|(?:@(!?%p\d+)\s+)?([a-z][\w.]*)([^;]*);|\.\w[^;]*;"
    for match in re.finditer(pattern, body):
        label, guard, opcode, operands = match.groups()
        if label is None and opcode is None:
            continue  # a declaration
        if label is not None or ended:
            name = label or f"{current}'"
            if not ended or blocks[current].taken is not None:
                blocks[current].after = name if not _leaves(blocks[current]) else None
            blocks[name], current, ended = Block(), name, False
            if label is not None:
                continue
        instruction = Instruction(opcode, operands.strip(), guard)
        if instruction.kind == "brx":
            raise ValueError(f"opcode={opcode}: branches through a table are not understood")
        blocks[current].body.append(instruction)
        if instruction.kind == "bra":
            blocks[current].taken = instruction.operands
        ended = instruction.kind in ("bra", "ret", "exit")
    return blocks


def _leaves(block: Block) -> bool:
    """Whether control never falls through to what stands below."""
    last = block.body[-1] if block.body else None
    return last is not None and last.kind in ("bra", "ret", "exit") and last.guard is None


def _successors(block: Block) -> list[str]:
    return [name for name in (block.taken, block.after) if name is not None]


def _loops_of(blocks: dict[str, Block]) -> dict[str, set[str]]:
    """Natural loops: the blocks of each by its head."""
    names = list(blocks)
    before: dict[str, set[str]] = {name: set() for name in names}
    for name, block in blocks.items():
        for successor in _successors(block):
            before[successor].add(name)
    dominators = {name: set(names) for name in names}
    dominators["entry"] = {"entry"}
    changed = True
    while changed:
        changed = False
        for name in names[1:]:
            above = [dominators[p] for p in before[name]]
            new = {name} | (set.intersection(*above) if above else set())
            if new != dominators[name]:
                dominators[name], changed = new, True
    loops: dict[str, set[str]] = {}
    for name, block in blocks.items():
        for head in _successors(block):
            if head in dominators[name]:
                body, waiting = {head}, [name]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting += before[inside]
                loops.setdefault(head, set()).update(body)
    return loops


def _conditions(blocks: dict[str, Block], body: set[str]) -> dict[str, tuple[str, bool]]:
    """Predicates that keep their value while a loop runs: what each says, and with which sign."""
    inside = [i for name in body for i in blocks[name].body]
    changing = {register for i in inside for register in i.written}
    conditions = {}
    everywhere = [i for block in blocks.values() for i in block.body]
    for i in everywhere:
        if i.kind != "setp":
            continue
        target, *compared = [part.strip() for part in i.operands.split(",")]
        if any(part in changing for part in compared):
            continue
        equality = re.match(r"setp\.(eq|ne)(.*)", i.opcode)
        what = f"{equality[2] if equality else i.opcode} {' '.join(compared)}"
        conditions[target] = (what, not equality or equality[1] == "eq")
    for block in blocks.values():
        for register in re.findall(r"%p\d+", " ".join(i.guard or "" for i in block.body)):
            if register not in changing:
                conditions.setdefault(register, (register, True))
    return conditions


def _turns_of(blocks: dict[str, Block], head: str, body: set[str]) -> list[Turn]:
    """The cheapest narrow-free way round for each choice of conditions and number of accesses."""
    narrow = {
        name for name in body if any(i.accesses_global and not i.is_wide for i in blocks[name].body)
    }
    conditions = _conditions(blocks, body)
    # Who asks element by element whether to make a narrow access is on the slow way already.
    asking = {
        name
        for name in body
        if narrow.intersection(_successors(blocks[name]))
        and not conditions.keys() & {(i.guard or "").lstrip("!") for i in blocks[name].body[-1:]}
    }
    allowed = body - narrow - asking
    if head not in allowed:
        return []
    # Counted in the order of a depth-first search, so that a block comes after all that lead to it.
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str) -> None:
        stack = [(start, iter(_successors(blocks[start])))]
        seen.add(start)
        while stack:
            name, following = stack[-1]
            successor = next((s for s in following if s in allowed and s not in seen), None)
            if successor is None:
                order.append(name)
                stack.pop()
            else:
                seen.add(successor)
                stack.append((successor, iter(_successors(blocks[successor]))))

    visit(head)
    order.reverse()
    place = {name: i for i, name in enumerate(order)}
    # (block, what is assumed, loads, stores) -> the cheapest way there, the block not yet counted.
    start = (head, frozenset(), 0, 0)
    ways: dict[tuple[object, ...], _Way] = {start: _Way(0, None, head)}
    at: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    at[head].add(start)
    finished: dict[tuple[object, ...], _Way] = {}
    for name in order:
        block = blocks[name]
        turn = Turn(tuple(block.body))
        for state in at[name]:
            _, assumed, loads, stores = state
            cost = ways[state].cost + turn.instructions
            for successor, more in _continue(block, conditions, assumed):
                new = (successor, more, loads + turn.loads, stores + turn.stores)
                if successor == head:
                    known = finished
                elif successor in place and place[successor] > place[name]:
                    known = ways
                    at[successor].add(new)
                else:
                    continue  # out of the loop, into a narrow access, or round an inner loop
                if new not in known or cost < known[new].cost:
                    known[new] = _Way(cost, state, name)
    turns = []
    for way in finished.values():
        names, step = [way.block], way.previous
        while step is not None and ways[step].previous is not None:
            names.append(ways[step].block)
            step = ways[step].previous
        turns.append(Turn(tuple(i for name in reversed(names) for i in blocks[name].body)))
    return turns


def _continue(
    block: Block, conditions: dict[str, tuple[str, bool]], assumed: frozenset[tuple[str, bool]]
) -> list[tuple[str, frozenset[tuple[str, bool]]]]:
    """Where control may go, and what is assumed then."""
    last = block.body[-1] if block.body else None
    if last is None or last.kind != "bra" or last.guard is None:
        return [(name, assumed) for name in _successors(block)]
    register = last.guard.lstrip("!")
    if register not in conditions:
        return [(name, assumed) for name in _successors(block)]
    what, sign = conditions[register]
    out = []
    negated = last.guard.startswith("!")
    for name, taken in ((block.taken, True), (block.after, False)):
        predicate = taken != negated
        value = predicate == sign
        if name is not None and _agrees(assumed, what, value):
            out.append((name, assumed | {(what, value)}))
    return out


def _agrees(assumed: frozenset[tuple[str, bool]], what: str, value: bool) -> bool:
    """Whether it fits what is assumed: one value a condition, one number a register."""
    if (what, not value) in assumed:
        return False
    if not value:
        return True
    left = what.rsplit(" ", 1)
    same = [w for w, v in assumed if v and w.rsplit(" ", 1)[0] == left[0] and w != what]
    return not (same and left[-1].lstrip("-").isdigit())
