"""Read a pickle as data: closed lists of opcodes, of names, and of what can be made by a name.

Python's and torch's unpicklers make objects: what a file names is called, and what that returns is changed as the file
says. Here a name calls nothing but a function of ``makers.py`` or ``values.py``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, Optional

import numpy as np
from torch import Tensor

from .makers import (
    BUILTINS,
    CONFIG_DICT,
    FUNCTION,
    FUNCTION_NAMES,
    HOLDERS,
    MAKERS,
    NAMES,
    Array,
    History,
    Namespace,
    Number,
    Token,
    dtype_of,
)

MAX_OPCODES = 500_000  # a training checkpoint of a ResNet-50 detector has 30,000
MAX_ARGUMENTS = 32  # a path has one for each folder
MAX_KEY = 2**61 - 1  # Python hashes larger ones to the same as small ones
KEYS = (str, int, float, bool, type(None))
MAX_KEY_TUPLE = 8
MAX_KEY_TUPLES = 1000  # in a file: tuples that Python hashes to the same can be found
MAX_TENSORS = 100_000
MAX_MEMBERS = 100_000  # of all sets in a file, with the sets: an empty one takes 216 bytes
MAX_WIDE_TEXT = 4 << 20  # bytes of texts whose characters take up to four bytes in memory for one in the file
MAX_COPIES = 4  # times the bytes of a pickle that what is copied out of it may take
COPIED = {str: 1, bytes: 1, dict: 100}  # bytes for each item
NARROW = bytes(range(0xC4))  # of UTF-8, in texts of characters up to 255


class DataUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python, reduced to what data needs in protocols 2 to 5.

    Args:
        file: The pickle.
        storage: Returns the storage that a persistent id describes, as a tensor of one axis.
        makers: What the file may call beside ``MAKERS``.
        max_opcodes: How many steps the pickle may take.
    """

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[Any], Tensor],
        makers: Optional[dict] = None,
        max_opcodes: int = MAX_OPCODES,
    ) -> None:
        super().__init__(file, encoding='ascii')
        sets = {
            f'{m}.{name}': make for m in BUILTINS for name, make in (('set', self._set), ('frozenset', self._frozen))
        }
        self.storage, self.makers, self.max_opcodes = storage, {**MAKERS, **sets, **(makers or {})}, max_opcodes
        self.wide_text_left, self.tuples_left, self.members_left = MAX_WIDE_TEXT, MAX_KEY_TUPLES, MAX_MEMBERS
        self.tensors_left = MAX_TENSORS
        start = file.tell()
        self.length = file.seek(0, io.SEEK_END) - start
        self.bytes_left = MAX_COPIES * self.length
        file.seek(start)

    def load(self) -> Any:
        """Return what the pickle describes; nothing that it names was run.

        Raises:
            pickle.UnpicklingError: If it asks for more than data, or is damaged.
        """
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)
        self.read, self.readinto, self.readline = self._unframer.read, self._unframer.readinto, self._unframer.readline
        self.metastack, self.stack, self.memo, self.proto = [], [], {}, 0
        self.append = self.stack.append
        try:
            for _ in range(self.max_opcodes):
                opcode = self.read(1)
                if opcode and opcode[0] not in HANDLERS:
                    raise pickle.UnpicklingError(f'its pickle has an instruction, {opcode!r}, that data does not need')
                HANDLERS[opcode[0]](self)
        except pickle._Stop as stop:
            return stop.value
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # damage surfaces as nearly anything
            raise pickle.UnpicklingError(
                f'its pickle is damaged or of an unknown kind: {type(error).__name__}'
            ) from None
        raise pickle.UnpicklingError(f'its pickle has more than {self.max_opcodes} steps')

    def _charge(self, length: int) -> None:
        """Count bytes that are copied out of the pickle, which may ask for the same copy many times."""
        self.bytes_left -= length
        if self.bytes_left < 0:
            raise pickle.UnpicklingError('it copies its bytes many times')

    def find_class(self, module: str, name: str) -> Token:
        """Return the token of an admitted name."""
        full = f'{module}.{name}'
        if full in FUNCTION_NAMES:
            return FUNCTION
        if full not in self.makers and full not in NAMES:
            raise pickle.UnpicklingError(f'it asks for {ascii(full[:60])[1:-1]}')
        return Token(full)

    def load_reduce(self) -> None:
        """Make what an admitted name makes."""
        args, name = self.stack.pop(), self.stack[-1]
        known = type(name) is Token and type(args) is tuple and name.name in self.makers
        if not known or len(args) > MAX_ARGUMENTS:
            raise pickle.UnpicklingError('it calls something that no checkpoint calls')
        self._charge(sum(len(arg) * COPIED[type(arg)] for arg in args if type(arg) in COPIED))
        self.stack[-1] = self.makers[name.name](*args)
        self.tensors_left -= type(self.stack[-1]) is Tensor
        if self.tensors_left < 0:
            raise pickle.UnpicklingError('it has more tensors than any checkpoint')

    def load_newobj(self) -> None:
        """Make a holder of an object's state."""
        args, name = self.stack.pop(), self.stack[-1]
        known = type(name) is Token and name.name in HOLDERS and type(args) is tuple
        if not known or (args and name.name != CONFIG_DICT):  # its items are given twice, here and as items
            raise pickle.UnpicklingError('it makes an object of a class that no checkpoint holds')
        self.stack[-1] = HOLDERS[name.name]()

    def load_build(self) -> None:
        """Give a holder its state, once. A dict's attributes, as torch's ``_metadata``, are left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) in (History, Namespace) and target.state is None and type(state) is dict:
            target.state = state
        elif type(target) is Array and target.values is None and type(state) is tuple and len(state) == 5:
            _, shape, number, fortran, data = state
            flat = np.frombuffer(data, dtype_of(number))
            self._charge(flat.nbytes)
            target.values = flat.reshape(shape, order='F' if fortran else 'C').copy(order='K')
        elif type(target) is Number and type(state) is tuple and state[1] in ('<', '|', '='):
            pass  # the byte order, which is the one of this machine
        elif type(target) is not dict:
            raise pickle.UnpicklingError(f'it sets attributes of a {type(target).__name__}')

    def load_append(self) -> None:
        """Append to a list."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """Append several items to a list."""
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError('it appends to something else than a list')
        self.stack[-1].extend(items)

    def load_setitem(self) -> None:
        """Set an item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_item(key, value)

    def load_setitems(self) -> None:
        """Set several items of a dict."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2]):
            self._set_item(key, value)

    def _set_item(self, key: Any, value: Any) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise pickle.UnpicklingError(f'it sets an item of a {type(target).__name__}')
        target[self._key(key)] = value

    def load_empty_set(self) -> None:
        """Append a set."""
        self.append(self._set([]))

    def load_additems(self) -> None:
        """Add several members to a set."""
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError('it adds to something else than a set')
        self.stack[-1].update(self._set(items))

    def load_frozenset(self) -> None:
        """Append a frozenset."""
        items = self.pop_mark()
        self.append(self._frozen(items))

    def _set(self, items: Any) -> set:
        if type(items) is not list:
            raise pickle.UnpicklingError('it asks for a set of something else than a list')
        self.members_left -= 1 + len(items)
        if self.members_left < 0:
            raise pickle.UnpicklingError('it has more sets than any checkpoint')
        return {self._key(item) for item in items}

    def _frozen(self, items: Any) -> frozenset:
        return frozenset(self._set(items))

    def _key(self, key: Any) -> Any:
        """Return a key of a dict or a member of a set that is cheap to hash and to compare."""
        if type(key) is str:
            return key
        parts = key if type(key) is tuple else (key,)
        if type(key) is tuple:
            self.tuples_left -= 1
        if self.tuples_left < 0 or len(parts) > MAX_KEY_TUPLE or any(type(part) not in KEYS for part in parts):
            raise pickle.UnpicklingError(f'it has a key of an unknown kind, a {type(key).__name__}')
        for part in parts:
            if type(part) is int and not -MAX_KEY < part < MAX_KEY or part != part:  # Python 3.8 hashes every nan to 0
                raise pickle.UnpicklingError('it has a key of too many digits, or one that is no number')
        return key

    def load_binunicode(self) -> None:
        """Append a text; long ones have characters of one byte, as arrays do, which are written as text."""
        self._append_text(self._counted(4))

    def load_short_binunicode(self) -> None:
        """Append a text of less than 256 bytes."""
        self._append_text(self._counted(1))

    def _append_text(self, data: bytes) -> None:
        if data.translate(None, NARROW):
            self.wide_text_left -= len(data)
        if self.wide_text_left < 0:
            raise pickle.UnpicklingError('its texts are too long')
        self.append(data.decode(errors='surrogatepass'))

    def load_binbytes(self) -> None:
        """Append bytes."""
        self.append(self._counted(4))

    def load_short_binbytes(self) -> None:
        """Append less than 256 bytes."""
        self.append(self._counted(1))

    def load_bytearray8(self) -> None:
        """Append the bytes of an array; nothing changes them."""
        self.append(self._counted(8))

    def _counted(self, width: int) -> bytes:
        """Return the next bytes, whose count takes ``width`` bytes before them."""
        length = int.from_bytes(self.read(width), 'little')
        data = self.read(length) if length <= self.length else b''
        if len(data) != length:
            raise pickle.UnpicklingError('it is incomplete')
        return data

    def load_frame(self) -> None:
        """Skip the length of a frame: what a frame holds is read as if it had none."""
        self.read(8)

    def load_binpersid(self) -> None:
        """Append the storage of a persistent id."""
        self.append(self.storage(self.stack.pop()))


_OWN = {
    pickle.REDUCE: 'reduce', pickle.NEWOBJ: 'newobj', pickle.BUILD: 'build', pickle.APPEND: 'append',
    pickle.APPENDS: 'appends', pickle.SETITEM: 'setitem', pickle.SETITEMS: 'setitems', pickle.BINPERSID: 'binpersid',
    pickle.BINUNICODE: 'binunicode', pickle.SHORT_BINUNICODE: 'short_binunicode', pickle.BINBYTES: 'binbytes',
    pickle.SHORT_BINBYTES: 'short_binbytes', pickle.BYTEARRAY8: 'bytearray8', pickle.FRAME: 'frame',
    pickle.EMPTY_SET: 'empty_set', pickle.ADDITEMS: 'additems', pickle.FROZENSET: 'frozenset',
}  # fmt: skip
_AS_PYTHON = (
    pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.MARK, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINSTRING,
    pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.STACK_GLOBAL,
)  # fmt: skip
HANDLERS = {
    **{opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _AS_PYTHON},
    **{opcode[0]: getattr(DataUnpickler, f'load_{name}') for opcode, name in _OWN.items()},
}
