// Linked into the extension so that it needs no newer system libraries than manylinux_2_28, as kernels must: each of these is
// a symbol that a newer C or C++ library has, and that newer headers ask for.
#include <sstream>

// Glibc 2.32. Zero says that there may be other threads, which is always a safe answer.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Libstdc++ 3.4.26.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
