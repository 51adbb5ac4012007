"""Reads a kernel that offline_build.py has built: its loops, its jumps and its accesses to memory."""

import re
import subprocess
import tempfile

import triton


def loops_of(lines):
    """The lines of each innermost loop: from a label to a branch back to it."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"([$.]L\w+):", line))}
    branch = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+([$.]L\w+)")
    branches = [(i, match[1]) for i, line in enumerate(lines) if (match := branch.search(line))]
    return innermost([range(labels[label], i + 1) for i, label in branches], lines)


def innermost(spans, lines):
    """The lines of each span that contains no other. Code moved out of line branches back too, over much more."""
    spans = [span for span in spans if span]
    return [
        [lines[i] for i in span]
        for span in spans
        if not any(other != span and set(other) <= set(span) for other in spans)
    ]


def accesses(lines):
    """("load" or "store", bits) for each instruction that reads or writes global memory."""
    found = []
    for line in lines:
        if match := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", line):
            found.append(("load" if match[1] == "ld" else "store", int(match[2] or 1) * int(match[3])))
        elif match := re.search(r"\b(?:global|buffer)_(load|store)_(\w+)", line):
            words = re.fullmatch(r"dword(?:x(\d))?", match[2])
            found.append((match[1], 32 * int(words[1] or 1) if words else 8 if "byte" in match[2] else 16))
    return found


def machine_code(build):
    """(address, instruction) pairs of an NVIDIA kernel's machine code."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(build.kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [
        (int(address, 16), code.strip())
        for address, code in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    ]


def machine_jumps(build):
    """The instructions of an NVIDIA kernel, and (place, target) of each jump among them."""
    code = machine_code(build)
    place_of, texts = {address: i for i, (address, _) in enumerate(code)}, [text for _, text in code]
    found = [(i, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for i, text in enumerate(texts)]
    return texts, [(i, place_of[int(match[1], 16)]) for i, match in found if match]


def machine_loops(build):
    """The instructions of each innermost loop."""
    texts, jumps = machine_jumps(build)
    return innermost([range(target, i + 1) for i, target in jumps], texts)


def spills_in_loops(build):
    """The instructions in innermost loops that store or load spilled registers."""
    loops = loops_of(build.lines) if build.kernel.asm.get("amdgcn") else machine_loops(build)
    return [
        code
        for loop in loops
        for code in loop
        if re.search(r"\b(?:STL|LDL|scratch_\w+|v_(?:read|write)lane\w*)\b", code)
    ]
