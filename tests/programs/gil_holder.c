/* Called through ctypes.PyDLL, which keeps the GIL: no Python thread of the process runs any more. */
#include <unistd.h>

void hold(void) {
    for (;;) {
        pause();
    }
}
