"""The errors: their tree, their attributes, and what they say."""

from __future__ import annotations

import errno
import inspect
import os
import pickle

import pytest

from aiouffd import errors
from aiouffd.errors import (
    ERRNO_MEANING,
    LayoutChanging,
    NotSupported,
    PeerError,
    RangeGone,
    ResolutionRefused,
    TargetGone,
    UffdError,
    refusal,
)

CLASSES = [
    one
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if issubclass(one, Exception) and one.__module__ == errors.__name__
]


def test_there_is_one_tree() -> None:
    """Every exception is a UffdError, and the tree in the docstring names each."""
    assert len(CLASSES) >= 15
    for one in CLASSES:
        assert issubclass(one, UffdError)
        assert one.__name__ in (errors.__doc__ or "") or one is UffdError
        assert one.__doc__


def test_not_supported_says_what_and_how() -> None:
    """What is missing and the remedy are attributes; together they are the message."""
    error = NotSupported("no userfaultfd here", "Run as root.")
    assert (error.missing, error.remedy) == ("no userfaultfd here", "Run as root.")
    assert str(error) == "no userfaultfd here. Run as root."
    again = pickle.loads(pickle.dumps(error))
    assert (again.missing, again.remedy) == (error.missing, error.remedy)


@pytest.mark.parametrize(
    "number, expected",
    [
        (errno.ESRCH, TargetGone),
        (errno.ENOENT, RangeGone),
        (errno.EAGAIN, LayoutChanging),
        (errno.EINVAL, ResolutionRefused),
        (errno.ENOMEM, ResolutionRefused),
        (errno.EBUSY, ResolutionRefused),
    ],
)
def test_the_errno_chooses_the_class(number: int, expected: type[ResolutionRefused]) -> None:
    """A refusal is an OSError too, with the kernel's errno and the range as attributes."""
    error = refusal("UFFDIO_COPY", number, 0x7000, 8192, done=4096)
    assert type(error) is expected
    assert isinstance(error, OSError)
    assert error.errno == number
    assert (error.call, error.start, error.length, error.done) == (
        "UFFDIO_COPY",
        0x7000,
        8192,
        4096,
    )


@pytest.mark.parametrize("number", ERRNO_MEANING)
def test_a_refusal_says_what_was_attempted_and_what_it_means(number: int) -> None:
    """Call, range, the errno's name if it has one, bytes done and meaning are in the text."""
    text = str(refusal("UFFDIO_ZEROPAGE", number, 0x7F0000, 4096))
    assert text.startswith("UFFDIO_ZEROPAGE of 4096 bytes at 0x7f0000 was refused with ")
    assert errno.errorcode.get(number, str(number)) in text
    assert "after 0 bytes" in text
    assert ERRNO_MEANING[number] in text


def test_a_poisoned_page_has_the_kernels_number() -> None:
    """EHWPOISON is known also where the errno module lacks the name."""
    assert os.strerror(133) == "Memory page has hardware error"
    assert "hardware-poisoned" in ERRNO_MEANING[133]


def test_a_refusal_by_an_errno_without_a_meaning() -> None:
    """The C library's words are used; a number nobody knows is shown as a number."""
    assert "EXDEV" in str(refusal("UFFDIO_COPY", errno.EXDEV, 0, 4096))
    assert "cross-device" in str(refusal("UFFDIO_COPY", errno.EXDEV, 0, 4096)).lower()
    assert "refused with 4095" in str(refusal("UFFDIO_COPY", 4095, 0, 4096))
    assert "refused with 0" in str(ResolutionRefused("UFFDIO_COPY", 0, 0, 4096))


def test_the_same_errno_of_another_call_means_something_else() -> None:
    """EPERM of PAGEMAP_SCAN is about write-protection and not about seals."""
    scan = str(refusal("PAGEMAP_SCAN", errno.EPERM, 0, 4096))
    assert "WP_ASYNC" in scan
    assert "WP_ASYNC" not in str(refusal("UFFDIO_REGISTER", errno.EPERM, 0, 4096))


@pytest.mark.parametrize(
    "kind",
    [
        errors.FaultError,
        errors.HandlerError,
        errors.SourceError,
        errors.DeadlineExceeded,
        errors.NoHandler,
        errors.StuckPage,
    ],
)
def test_a_faults_error_knows_its_page(kind: type[errors.FaultError]) -> None:
    """The page's address is an attribute, and may be unknown."""
    assert kind("no bytes").address is None
    error = kind("no bytes", 0x4000)
    assert isinstance(error, errors.FaultError)
    assert (str(error), error.address) == ("no bytes", 0x4000)


def test_a_peers_error_names_the_peer() -> None:
    """Who broke the protocol stands before what was wrong, if it is known."""
    assert str(PeerError("no descriptor came")) == "no descriptor came"
    error = PeerError("no descriptor came", peer="pid 4242")
    assert (str(error), error.peer) == ("pid 4242: no descriptor came", "pid 4242")


def test_an_images_error_names_file_and_offset() -> None:
    """What is wrong stands behind the place where it is, if it has one; all are attributes."""
    error = errors.ImageError("pagemap-7.img", 40, "it is cut short")
    assert isinstance(error, errors.SourceError)
    assert str(error) == "pagemap-7.img at offset 40: it is cut short"
    assert (error.file, error.offset, error.problem) == ("pagemap-7.img", 40, "it is cut short")
    assert str(errors.ImageError("mm-7.img", None, "there is none")) == "mm-7.img: there is none"


def test_a_failed_migration_says_where_the_program_is() -> None:
    """Its stage and its outcome are attributes; nothing is assumed where they are not known."""
    error = errors.MigrationFailed("no line", stage="following", outcome="unknown")
    assert (str(error), error.stage, error.outcome) == ("no line", "following", "unknown")
    assert (errors.MigrationFailed("x").stage, errors.MigrationFailed("x").outcome) == ("", "")
