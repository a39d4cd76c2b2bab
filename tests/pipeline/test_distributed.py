"""How a rank's process ends."""

import subprocess
import sys


def test_a_process_ends_at_once_with_its_code_its_output_and_what_is_registered_at_exit():
    program = (
        "import atexit, threading, time\n"
        "from pipeline import distributed\n"
        "distributed.start()\n"
        "threading.Thread(target=time.sleep, args=[100]).start()\n"  # the interpreter's own end would wait for it
        "atexit.register(print, 'registered', end='')\n"
        "print('said', end=' ')\n"
        "distributed.finish()\n"
        "distributed.end_process(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "said registered")
