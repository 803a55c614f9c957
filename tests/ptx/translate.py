"""Makes C++ of PTX: a function of a machine's thread for each kernel and device function, one line for each instruction.

    python translate.py kernels.ptx kernels.cpp

What an instruction computes is C++'s own operator or a function of arithmetic.h; what threads do to each other and to memory is a call of machine.h.
Every instruction by which threads wait or exchange becomes a Site with a name, so that a test can take it out. An instruction that is not known here
is an error.
"""

import re
import sys
from pathlib import Path

from arithmetic import SIZES, TYPES, Arithmetic, identifier
from parse import Function, Module, Statement, Variable, parse, split, variable


def aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


class Translation(Arithmetic):
    """One function: its registers, its arrays, and its lines."""

    def __init__(self, function: Function, shared: dict[str, int], shared_size: int):
        super().__init__(shared)
        self.function = function
        self.shared_size = shared_size
        self.lines: list[str] = []
        self.sites: list[str] = []
        self.place = ("", 0)

    # Instructions

    def site(self, kind: str) -> str:
        """An instruction by which threads wait for each other, or exchange."""
        file, line = self.place
        self.sites.append(f'{{"{kind}", "{self.function.name}", "{file}", {line}, false}}')
        return f"sites_of_{identifier(self.function.name)}[{len(self.sites) - 1}]"

    def instruction(self, text: str) -> str:
        """One of them without its predicate."""
        opcode, _, rest = text.partition(" ")
        name, *modifiers = opcode.split(".")
        handler = getattr(self, f"do_{name}", None)
        return handler(modifiers, split(rest)) if handler else self.do_value(name, modifiers, split(rest))

    # Memory

    def place_of(self, modifiers: list[str], operand: str, bytes: int, access: str) -> str:
        """Where the bytes are, as a pointer, after the machine has looked at the access."""
        space = next((m for m in modifiers if m in ("param", "local", "shared", "global", "const")), "generic")
        if space in ("param", "local", "const"):
            return f"(char*)({self.address(operand)})"
        address = self.address(operand, "uint32_t" if space == "shared" else "uint64_t")
        return f"t.{access}_{space}({address}, {bytes})"

    def do_ld(self, modifiers: list[str], operands: list[str]) -> str:
        type = TYPES[modifiers[-1]]
        registers = split(operands[0][1:-1]) if operands[0].startswith("{") else [operands[0]]
        wait = "t.spin(); " if "acquire" in modifiers or "volatile" in modifiers else ""  # others may have to write it first
        place = f"({type}*){self.place_of(modifiers, operands[1], SIZES[type] * len(registers), 'load')}"
        if len(registers) == 1:
            return wait + self.assign(operands[0], type, f"*{place}")
        loads = (self.assign(r, type, f"at[{i}]") for i, r in enumerate(registers) if r != "_")
        return f"{wait}const {type}* at = {place}; {' '.join(loads)}"

    def do_st(self, modifiers: list[str], operands: list[str]) -> str:
        type = TYPES[modifiers[-1]]
        registers = split(operands[1][1:-1]) if operands[1].startswith("{") else [operands[1]]
        place = f"({type}*){self.place_of(modifiers, operands[0], SIZES[type] * len(registers), 'store')}"
        if len(registers) == 1:
            return f"*{place} = {self.value(operands[1], type)};"
        stores = (f"at[{i}] = {self.value(r, type)};" for i, r in enumerate(registers))
        return f"{type}* at = {place}; {' '.join(stores)}"

    def do_atom(self, modifiers: list[str], operands: list[str]) -> str:
        if "add" not in modifiers or "shared" in modifiers:
            raise ValueError("no atomic operation but adding in global memory is known")
        type = TYPES[modifiers[-1]]
        add = f"t.atomic_add<{type}>({self.address(operands[1])}, {self.value(operands[2], type)})"
        return self.assign(operands[0], type, add) if operands[0] != "_" else f"{add};"

    def do_cp(self, modifiers: list[str], operands: list[str]) -> str:
        if "wait_group" in modifiers:
            return f"t.wait_group({operands[0]}, {self.site('cp.async.wait_group')});"
        if "commit_group" in modifiers:
            return "t.commit_group();"
        if modifiers[:1] != ["async"] or "bulk" in modifiers or len(operands) != 3:
            raise ValueError("such a copy is not known")
        return f"t.copy_async({self.address(operands[0], 'uint32_t')}, {self.address(operands[1])}, {operands[2]});"

    # Threads

    def do_bar(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers[0] == "warp":
            return f"t.warp_sync({self.value(operands[0], 'uint32_t')}, {self.site('bar.warp.sync')});"
        return self.do_barrier(["aligned", *modifiers], operands)

    def do_barrier(self, modifiers: list[str], operands: list[str]) -> str:
        as_one = str("aligned" in modifiers).lower()  # whether a warp must come to it as one
        if "cluster" in modifiers:
            half = "arrive" if "arrive" in modifiers else "wait"
            return f"t.cluster_{half}({self.site(f'barrier.cluster.{half}')}, {as_one});"
        if "sync" not in modifiers or operands != ["0"]:
            raise ValueError("no barrier but number 0, of all threads, is known")
        return f"t.block_sync({self.site('bar.sync')}, {as_one});"

    def do_shfl(self, modifiers: list[str], operands: list[str]) -> str:
        register, _, found = operands[0].partition("|")
        value, lane, clamp, mask = (self.value(o, "uint32_t") for o in operands[1:])
        result = self.assign(
            register, "uint32_t", f"t.shuffle(Shuffle::{modifiers[1]}, {value}, {lane}, {clamp}, {mask}, {self.site('shfl.sync')}, found)"
        )
        return f"bool found; {result}" + (f" {identifier(found)} = found;" if found else "")

    def do_griddepcontrol(self, modifiers: list[str], operands: list[str]) -> str:
        return ""  # the kernel before has ended when this one begins

    def do_fence(self, modifiers: list[str], operands: list[str]) -> str:
        return ""  # fibers see each other's writes at once

    do_membar = do_fence

    def do_bra(self, modifiers: list[str], operands: list[str]) -> str:
        return f"goto {operands[0]};"

    def do_ret(self, modifiers: list[str], operands: list[str]) -> str:
        return "return;"

    do_exit = do_ret

    def do_trap(self, modifiers: list[str], operands: list[str]) -> str:
        return 't.fail("trap");'

    def do_call(self, modifiers: list[str], operands: list[str]) -> str:
        results = split(operands.pop(0)[1:-1]) if operands[0].startswith("(") else []
        arguments = split(operands[1][1:-1]) if len(operands) > 1 else []
        return f"{identifier(operands[0])}({', '.join(['t', *results, *arguments])});"

    # All of it

    def declare(self, text: str) -> None:
        """Registers, arrays of a thread, shared memory."""
        if text.startswith(".reg"):
            type = TYPES[text.split()[1][1:]]
            names = []
            for name in split(text.split(maxsplit=2)[2]):
                many = re.fullmatch(r"(%\w+)<(\d+)>", name)
                names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            used = [name for name in names if name in self.words]
            self.registers |= dict.fromkeys(used, type)
            if used:
                self.lines.append(f"  {type} {', '.join(f'{identifier(name)}{{}}' for name in used)};")
            return
        found = variable(text)
        if text.startswith(".shared"):
            self.shared_size = aligned(self.shared_size, found.align)
            self.shared[found.name] = self.shared_size
            self.shared_size += found.size
        else:
            self.lines.append(f"  alignas(16) char {found.name}[{max(found.size, 1)}];")

    def statement(self, statement: Statement) -> None:
        text, self.place = statement.text, statement.place
        if text in "{}" or text.endswith(":"):
            self.lines.append(f"  {text}" + (";" if text.endswith(":") else ""))
        elif text.startswith("."):
            self.declare(text)
        else:
            predicate = re.match(r"@(!?)(%?\w+) ", text)
            line = self.instruction(text[predicate.end() :] if predicate else text)
            if predicate:
                line = f"if ({predicate[1]}{identifier(predicate[2])}) {{ {line} }}"
            elif line.startswith(("const", "bool")) or " at = " in line:
                line = f"{{ {line} }}"
            self.lines.append(f"  {line}")

    def head(self) -> str:
        arrays = "" if self.function.is_kernel else "".join(f", char* {v.name}" for v in self.function.results + self.function.parameters)
        return f"static void {identifier(self.function.name)}(Thread& t{arrays})"

    def run(self) -> str:
        self.words = set(re.findall(r"[%\w$]+", " ".join(s.text for s in self.function.statements)))
        for offset, v in parameters_of(self.function):
            self.lines.append(f"  char* {v.name} = t.parameters + {offset};")
        self.lines.append("  uint32_t carry = 0;")
        for statement in self.function.statements:
            try:
                self.statement(statement)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{statement.text!r} in {self.function.name}: {error}") from error
        sites = f"static Site sites_of_{identifier(self.function.name)}[] = {{{', '.join(self.sites)}}};\n" if self.sites else ""
        sites += (
            f"static const bool known_{identifier(self.function.name)} = add_sites(sites_of_{identifier(self.function.name)}, {len(self.sites)});\n"
            if self.sites
            else ""
        )
        return "\n".join([f"{sites}{self.head()} {{", *self.lines, "}\n"])


def parameters_of(function: Function) -> list[tuple[int, Variable]]:
    """A kernel's parameters and their offsets."""
    offset, found = 0, []
    for v in function.parameters if function.is_kernel else []:
        offset = aligned(offset, v.align)
        found.append((offset, v))
        offset += v.size
    return found


def translate(module: Module) -> str:
    """A source file that makes its kernels known to the machine."""
    shared, size = {}, 0
    for v in module.shared:
        size = aligned(size, v.align)
        shared[v.name] = size if v.size else -1
        size += v.size
    lines = ['#include "machine.h"', '#include "arithmetic.h"', "namespace {"]
    lines += [f"alignas({v.align}) unsigned char {v.name}[{v.size}] = {{{value}}};" for v, value in module.constants]
    # what functions keep in shared memory lies below what kernels do, whoever calls them
    translations = []
    for function in sorted(module.functions, key=lambda f: f.is_kernel):
        translation = Translation(function, shared, size)
        translations.append((translation, translation.run()))
        if not function.is_kernel:
            size = translation.shared_size
    lines += [f"{translation.head()};" for translation, _ in translations]
    lines += [text for _, text in translations]
    kernels = []
    for translation, _ in translations:
        if translation.function.is_kernel:
            places = ", ".join(f"{{{offset}, {v.size}}}" for offset, v in parameters_of(translation.function))
            name = translation.function.name
            kernels.append(f'  add_kernel({{"{name}", {identifier(name)}, {translation.shared_size}, {{{places}}}}});')
    return "\n".join([*lines, "const bool known = [] {", *kernels, "  return true;", "}();", "}  // namespace", ""])


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(translate(parse(source.read_text())))
