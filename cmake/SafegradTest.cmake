# safegrad_add_test(NAME name SOURCES ... [LIBRARIES ...] [RANKS n ...] [LABELS ...] [TIMEOUT s])
#
# A GoogleTest program. Without RANKS it runs as it is; with RANKS once for each number, under mpirun, where every rank runs all tests and
# the exit code is the worst of all ranks. More ranks than cores are fine: tests never measure time.
find_package(GTest REQUIRED)

function(safegrad_add_test)
  cmake_parse_arguments(T "" "NAME;TIMEOUT" "SOURCES;LIBRARIES;RANKS;LABELS" ${ARGN})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 120)
  endif()
  if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=")
    math(EXPR T_TIMEOUT "5 * ${T_TIMEOUT}")
  endif()
  add_executable(${T_NAME} ${T_SOURCES})
  target_include_directories(${T_NAME} PRIVATE "${CMAKE_SOURCE_DIR}/tests")
  target_compile_definitions(${T_NAME} PRIVATE SAFEGRAD_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  set(environment "OMP_NUM_THREADS=1")
  if(T_RANKS)
    target_link_libraries(${T_NAME} PRIVATE ${T_LIBRARIES} GTest::gtest)
    # OpenMPI leaks in components that it has unloaded before a sanitizer's report: no suppression could name them.
    list(APPEND environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 ASAN_OPTIONS=detect_leaks=0)
    foreach(ranks ${T_RANKS})
      add_test(NAME ${T_NAME}_${ranks} COMMAND mpirun --quiet --oversubscribe -n ${ranks} $<TARGET_FILE:${T_NAME}>)
      set_tests_properties(${T_NAME}_${ranks} PROPERTIES LABELS "${T_LABELS}" TIMEOUT ${T_TIMEOUT}
        ENVIRONMENT "${environment}" PROCESSORS 2)
    endforeach()
  else()
    target_link_libraries(${T_NAME} PRIVATE ${T_LIBRARIES} GTest::gtest GTest::gtest_main)
    add_test(NAME ${T_NAME} COMMAND ${T_NAME})
    set_tests_properties(${T_NAME} PROPERTIES LABELS "${T_LABELS}" TIMEOUT ${T_TIMEOUT} ENVIRONMENT "${environment}")
  endif()
endfunction()
