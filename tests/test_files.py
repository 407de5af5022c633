"""quill/files.py: several files are replaced together. tests/test_properties.py fails a write at every point."""

import pytest

from quill.errors import UserError
from quill.files import replacing


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    first, last = tmp_path / "new" / "first", tmp_path / "new" / "last"
    for content in (b"1", b"2"):
        with replacing(first, last) as files:
            for file in files:
                file.write(content)
            assert not first.exists() or first.read_bytes() == last.read_bytes() == b"1"
        assert first.read_bytes() == last.read_bytes() == content

    def interrupted():
        with replacing(first, last) as files:
            files[0].write(b"3")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert first.read_bytes() == last.read_bytes() == b"2"
    assert len(list(first.parent.iterdir())) == 2
    with pytest.raises(UserError, match="can't write"), replacing(first / "below"):
        pass
