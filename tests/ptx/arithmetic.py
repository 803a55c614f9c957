"""What PTX computes, as C++: operands, and the instructions that do nothing but give a register a value."""

import re

from parse import split

TYPES = {"pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t"}
TYPES |= {f"{kind}{bits}": f"{'int' if kind == 's' else 'uint'}{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)}
SIZES = {"bool": 1, "float": 4, "double": 8} | {f"{sign}int{bits}_t": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
WIDE = {"uint16_t": "uint32_t", "int16_t": "int32_t", "uint32_t": "uint64_t", "int32_t": "int64_t"}
FLOATS = ("float", "double")
MODULO = ("add", "sub", "mul", "mad", "neg")  # of signed numbers as of unsigned ones: C++ has no overflow for those

# what an instruction without side effects computes, of its operands in the type that it names
VALUES = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "mad": "{0} * {1} + {2}",
    "fma": "std::fma({0}, {1}, {2})",
    "div": "quotient({0}, {1})",
    "rem": "remainder_of({0}, {1})",
    "sqrt": "std::sqrt({0})",
    "rcp": "1 / {0}",
    "min": "minimum({0}, {1})",
    "max": "maximum({0}, {1})",
    "abs": "absolute({0})",
    "neg": "-{0}",
    "not": "~{0}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "shl": "shift_left({0}, {1})",
    "shr": "shift_right({0}, {1})",
    "copysign": "std::copysign({1}, {0})",
    "bfi": "insert_bits({0}, {1}, {2}, {3})",
    "bfe": "extract_bits({0}, {1}, {2})",
    "clz": "leading_zeros({0})",
    "popc": "__builtin_popcountll({0})",
    "mov": "{0}",
}
COUNTS = {"shl": (1,), "shr": (1,), "bfi": (2, 3), "bfe": (1, 2)}  # operands of 32 bits, whatever the type
COMPARISONS = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"equ": "!=", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # true where that is false, so of NaN too
ROUNDINGS = {"rzi": "std::trunc", "rni": "std::nearbyint", "rmi": "std::floor", "rpi": "std::ceil"}


def identifier(name: str) -> str:
    return name.removeprefix("%").replace(".", "_")


class Arithmetic:
    """The registers of one function and where its variables are."""

    def __init__(self, shared: dict[str, int]):
        self.registers: dict[str, str] = {}
        self.shared = dict(shared)  # offsets; -1 where it is dynamic

    # Operands

    def value(self, operand: str, type: str) -> str:
        """An operand as a C++ expression of that type."""
        operand = operand.strip()
        if found := re.fullmatch(r"%(n?tid|n?ctaid)\.([xyz])", operand):
            return f"t.{found[1]}({'xyz'.index(found[2])})"
        if operand.startswith("%envreg"):
            return f"t.environment({operand[7:]})"
        if operand in ("%laneid", "WARP_SZ"):
            return "t.lane()" if operand == "%laneid" else "32u"
        if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", operand):
            wide = len(found[1]) == 16
            return f"bits<{'double' if wide else 'float'}>(0x{found[1]}{'ull' if wide else 'u'})"
        if re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)U?", operand):
            number = int(operand.rstrip("U"), 0) & (256 ** SIZES[type] - 1 if type != "bool" else 1)
            integer = f"{number}{'ull' if SIZES[type] == 8 else 'u'}"
            return f"bits<{type}>({integer})" if type in FLOATS else f"({type}){integer}"
        if operand in self.registers:
            return self.convert(identifier(operand), self.registers[operand], type)
        if operand in self.shared:
            offset = self.shared[operand]
            return "t.dynamic_shared()" if offset < 0 else f"{offset}u"
        if re.fullmatch(r"[\w$]+", operand):  # an array, or a variable of the module
            return f"(uint64_t){operand}"
        raise ValueError(f"{operand} is no operand that is known")

    @staticmethod
    def convert(expression: str, have: str, want: str) -> str:
        if have == want:
            return expression
        if (have in FLOATS) == (want in FLOATS):
            return f"({want}){expression}"
        if SIZES[have] == SIZES[want]:
            return f"bits<{want}>({expression})"
        return f"({want})bits<{'uint32_t' if have == 'float' else 'uint64_t'}>({expression})"

    def assign(self, register: str, type: str, expression: str) -> str:
        """A register is given a value of that type."""
        have = self.registers[register.strip()]
        if type in FLOATS and have not in FLOATS:
            expression = f"bits<uint{SIZES[type] * 8}_t>(({type})({expression}))"
        elif have in FLOATS and type not in FLOATS:
            expression = f"bits<{have}>((uint{SIZES[have] * 8}_t)({expression}))"
        elif SIZES[type] < SIZES[have]:
            expression = f"({type})({expression})"  # so that a sign is kept
        return f"{identifier(register.strip())} = {expression};"

    def address(self, operand: str, type: str = "uint64_t") -> str:
        """Of `[register + offset]`."""
        base, _, offset = operand.strip()[1:-1].partition("+")
        return self.value(base, type) + (f" + ({int(offset, 0)})" if offset.strip() not in ("", "0") else "")

    def do_value(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        if name not in VALUES:
            raise ValueError("no such instruction is known")
        type = TYPES[modifiers[-1]]
        if name in MODULO and type.startswith("int"):
            type = f"u{type}"
        if name == "not" and type == "bool":
            return f"{identifier(operands[0])} = !{self.value(operands[1], 'bool')};"
        counts = COUNTS.get(name, ())
        values = [self.value(o, "uint32_t" if i in counts else type) for i, o in enumerate(operands[1:])]
        result = "uint32_t" if name in ("clz", "popc") else type
        return self.assign(operands[0], result, VALUES[name].format(*values))

    def do_mul(self, modifiers: list[str], operands: list[str]) -> str:
        return self.product("mul", modifiers, operands)

    def do_mad(self, modifiers: list[str], operands: list[str]) -> str:
        return self.carried("mad", modifiers, operands) if "cc" in modifiers else self.product("mad", modifiers, operands)

    def product(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        type = TYPES[modifiers[-1]]
        if "wide" in modifiers:
            wide = WIDE[type]
            factors = " * ".join(f"({wide}){self.value(o, type)}" for o in operands[1:3])
            return self.assign(operands[0], wide, factors + "".join(f" + {self.value(o, wide)}" for o in operands[3:]))
        if "hi" in modifiers:
            if name == "mad":
                raise ValueError("mad.hi is not known")
            return self.assign(operands[0], type, f"high_product({', '.join(self.value(o, type) for o in operands[1:])})")
        return self.do_value(name, modifiers, operands)

    def do_add(self, modifiers: list[str], operands: list[str]) -> str:
        return self.carried("add", modifiers, operands) if "cc" in modifiers else self.do_value("add", modifiers, operands)

    def do_sub(self, modifiers: list[str], operands: list[str]) -> str:
        return self.carried("sub", modifiers, operands) if "cc" in modifiers else self.do_value("sub", modifiers, operands)

    def do_addc(self, modifiers: list[str], operands: list[str]) -> str:
        return self.carried("addc", modifiers, operands)

    def do_subc(self, modifiers: list[str], operands: list[str]) -> str:
        return self.carried("subc", modifiers, operands)

    def do_madc(self, modifiers: list[str], operands: list[str]) -> str:
        return self.carried("madc", modifiers, operands)

    def carried(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        """With a carry out, or in: of 32 bits in 64, of 64 in 128."""
        bits = int(modifiers[-1][1:])
        type, wide = f"uint{bits}_t", "uint64_t" if bits == 32 else "unsigned __int128"
        a, b, *c = (f"({wide}){self.value(o, type)}" for o in operands[1:])
        if name.startswith("mad"):
            a, b = f"({wide})({type})(({a} * {b}) >> {bits if 'hi' in modifiers else 0})", c[0]
        carry_in = f" {'-' if 'sub' in name else '+'} carry" if name.endswith("c") else ""
        carry_out = f" carry = (uint32_t)(sum >> {bits}) & 1;" if "cc" in modifiers else ""
        return f"const {wide} sum = {a} {'-' if 'sub' in name else '+'} {b}{carry_in}; {self.assign(operands[0], type, f'({type})sum')}{carry_out}"

    def do_rcp(self, modifiers: list[str], operands: list[str]) -> str:
        if "approx" not in modifiers:
            return self.do_value("rcp", modifiers, operands)
        type = TYPES[modifiers[-1]]
        return self.assign(operands[0], type, f"rough_reciprocal({self.value(operands[1], type)})")

    def do_shf(self, modifiers: list[str], operands: list[str]) -> str:
        low, high, count = (self.value(o, "uint32_t") for o in operands[1:])
        return self.assign(
            operands[0],
            "uint32_t",
            f"funnel_shift_{'left' if modifiers[0] == 'l' else 'right'}<{str('clamp' in modifiers).lower()}>({low}, {high}, {count})",
        )

    def do_prmt(self, modifiers: list[str], operands: list[str]) -> str:
        return self.assign(operands[0], "uint32_t", f"permute_bytes({', '.join(self.value(o, 'uint32_t') for o in operands[1:])})")

    def do_setp(self, modifiers: list[str], operands: list[str]) -> str:
        comparison, type = modifiers[0], TYPES[modifiers[-1]]
        a, b = (self.value(o, type) for o in operands[1:3])
        if len(operands) > 3 or "|" in operands[0]:
            raise ValueError("setp with more than a comparison is not known")
        if comparison in ("ne", "neu", "num", "nan"):
            ordered = {"ne": f"{a} != {b}", "neu": f"{a} != {b}", "num": f"{a} == {a} && {b} == {b}", "nan": f"{a} != {a} || {b} != {b}"}[
                comparison
            ]
            test = f"{a} < {b} || {a} > {b}" if comparison == "ne" and type in FLOATS else ordered
        elif comparison in UNORDERED:
            test = f"!({a} < {b} || {a} > {b})" if comparison == "equ" else f"!({a} {UNORDERED[comparison]} {b})"
        else:
            test = f"{a} {COMPARISONS[comparison]} {b}"
        return self.assign(operands[0], "bool", test)

    def do_selp(self, modifiers: list[str], operands: list[str]) -> str:
        type = TYPES[modifiers[-1]]
        yes, no = (self.value(o, type) for o in operands[1:3])
        return self.assign(operands[0], type, f"{self.value(operands[3], 'bool')} ? {yes} : {no}")

    def do_cvt(self, modifiers: list[str], operands: list[str]) -> str:
        to, source = modifiers[-2], modifiers[-1]
        if {"sat", "relu"} & set(modifiers):
            raise ValueError("such a conversion is not known")
        x = self.value(operands[1], TYPES[source])
        if source in ("f16", "bf16"):
            x, source = f"from_{source}({x})", "f32"
        rounding = ROUNDINGS.get(modifiers[0], "")
        if to in ("f16", "bf16"):
            x = f"to_{to}({x})"
        elif source in ("f32", "f64") and TYPES[to] not in FLOATS:
            x = f"to_integer<{TYPES[to]}>({rounding}({x}))"
        else:
            x = f"({TYPES[to]}){rounding}({x})"
        return self.assign(operands[0], TYPES[to], x)

    def do_mov(self, modifiers: list[str], operands: list[str]) -> str:
        to, source = operands
        size = SIZES[TYPES[modifiers[-1]]]
        if to.startswith("{"):
            parts = split(to[1:-1])
            each = size * 8 // len(parts)
            pieces = (self.assign(r, f"uint{each}_t", f"(uint{each}_t)(whole >> {i * each})") for i, r in enumerate(parts) if r != "_")
            return f"const uint64_t whole = {self.value(source, f'uint{size * 8}_t')}; {' '.join(pieces)}"
        if source.startswith("{"):
            parts = split(source[1:-1])
            each = size * 8 // len(parts)
            whole = " | ".join(f"(uint64_t){self.value(r, f'uint{each}_t')} << {i * each}" for i, r in enumerate(parts))
            return self.assign(to, f"uint{size * 8}_t", f"(uint{size * 8}_t)({whole})")
        return self.do_value("mov", modifiers, operands)

    def do_cvta(self, modifiers: list[str], operands: list[str]) -> str:
        """Between a generic address and one of a memory; only in shared memory they differ."""
        address = self.value(operands[1], "uint64_t")
        if "shared" in modifiers:
            address = f"t.shared_offset({address})" if "to" in modifiers else f"t.generic_address({address})"
        return self.assign(operands[0], "uint64_t", address)

    def do_mapa(self, modifiers: list[str], operands: list[str]) -> str:
        return self.assign(
            operands[0], "uint64_t", f"t.peer_address({self.value(operands[1], 'uint64_t')}, {self.value(operands[2], 'uint32_t')})"
        )
