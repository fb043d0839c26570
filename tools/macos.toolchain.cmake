# Cross-compiles for a Mac with zig (PyPI's ziglang): used by tools/check_macos.py, never for a release.
if(NOT DEFINED CMAKE_CXX_CREATE_SHARED_MODULE)
  set(CMAKE_SYSTEM_NAME Darwin)
  set(CMAKE_SYSTEM_PROCESSOR arm64)
  set(CMAKE_OSX_SYSROOT "")  # zig brings its own
  set(CMAKE_CXX_COMPILER $ENV{PYTHON} -m ziglang c++ -target aarch64-macos.14.0)
  set(CMAKE_INSTALL_NAME_TOOL true)  # nothing is installed; CMake only insists on having one
  # CMake reads this file once more after its own rules for Darwin, so that those below replace them.
  set(CMAKE_USER_MAKE_RULES_OVERRIDE "${CMAKE_CURRENT_LIST_FILE}")
else()
  set(CMAKE_CXX_ARCHIVE_CREATE "$ENV{PYTHON} -m ziglang ar qc <TARGET> <OBJECTS>")
  set(CMAKE_CXX_ARCHIVE_FINISH "")
  # zig's linker takes no file of symbols that Python will supply (nanobind's `-Wl,@…sym`), so it allows any to be
  # missing; the script then checks what is missing against that file.
  set(CMAKE_CXX_CREATE_SHARED_MODULE
      "<CMAKE_CXX_COMPILER> -shared -Wl,-undefined,dynamic_lookup -o <TARGET> <OBJECTS> <LINK_LIBRARIES>")
endif()
